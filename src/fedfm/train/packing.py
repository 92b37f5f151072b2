"""Batches without padding: the blocks of a model see the real tokens of all rows in one long row.

A padded batch of texts of unequal length is up to half padding, and the more clients train together, the more of it.
Here what enters the first block, ``[R, T, D]``, becomes ``[1, N, D]`` with the N tokens that count, and what leaves the
last one is laid out in rows again. Layers that work token by token notice nothing; attention, which does not, lays its
queries, keys and values out in rows, attends, and packs what it finds. Answers are those of the padded batch up to
rounding.

In a model that looks only back, two more kinds of tokens need not be computed:

- What follows the last position of a row from which something is predicted.
- The beginning that a client's rows have in common, as dialogues share a system prompt: it is computed once, its
  hidden states stand in all rows, and its gradient is the sum over them. Not done where dropout draws a mask for each.

Letters in shapes: C clients, R rows, T tokens of the longest row, N tokens that are computed, D width, H heads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from fedfm.models.architectures import looks_back
from fedfm.tasks.task import IGNORE, Batch
from fedfm.train.lean import gated, lean

if TYPE_CHECKING:
    from fedfm.models import Loaded
    from fedfm.train.dropout import Draws

NAME = "fedfm_packed"
"""Name of :func:`attention` among the attention functions of transformers."""

_HARMLESS = {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "cache_position", "is_causal"}
STEP = 12
"""Rows whose lengths differ by less attend together."""

_now: Packing | None = None


@dataclass(frozen=True)
class Layout:
    """Tokens laid out in padded rows, M places in all.

    Args:
        place: what stands in each place: one of the N tokens, ``[M]``.
        slots: where each token stands, in the row to which it belongs, ``[N]``.
        copies: of each row that begins like the first row of its client: the row's first place, the first token of what
            they share, how many tokens.
    """

    place: torch.Tensor
    slots: torch.Tensor
    copies: list[tuple[int, int, int]]


class Packing:
    """Where the tokens of a batch are computed.

    Args:
        lengths: tokens of each row that count, from the first on, ``[R]``.
        shared: how many of them are those of the first row of the same client, ``[R]``; 0 for that row itself.
        rows: rows of each client; clients stand one below the other.
        width: T.
        draws: dropout masks, where there is dropout.
        device: where the model is.
    """

    def __init__(
        self,
        lengths: torch.Tensor,
        shared: torch.Tensor,
        rows: Sequence[int],
        width: int,
        draws: Draws | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.lengths = lengths
        self.shared = shared
        self.rows = [0]
        for count in rows:
            self.rows.append(self.rows[-1] + count)
        self.draws = draws
        self.device = torch.device(device)
        self._lay(width)

    @classmethod
    def of(
        cls,
        batch: Batch,
        rows: Sequence[int],
        looks_back: bool,
        draws: Draws | None = None,
        device: torch.device | str = "cpu",
    ) -> Packing:
        """The packing of a batch that lies in the processor's memory.

        Args:
            batch: padded.
            rows: of each client.
            looks_back: whether a token's hidden state depends on no later token.
            draws: dropout masks, where there is dropout.
            device: where the model is.
        """
        lengths, width = batch.lengths, batch.input_ids.shape[1]
        shared = torch.zeros_like(lengths)
        if looks_back:
            if batch.target.dim() == 2:
                # The state at t predicts the target at t + 1, so that of the last target is not needed.
                places = torch.arange(width) * (batch.target != IGNORE)
                lengths = places.amax(1).clamp(min=1)
            if draws is None:
                first = _firsts(rows)
                alike = (batch.input_ids == batch.input_ids[first]).long().cumprod(1).sum(1)
                shared = torch.minimum(alike, torch.minimum(lengths, lengths[first]))
                shared[first.unique()] = 0
        return cls(lengths, shared, rows, width, draws, device)

    @classmethod
    def unpacked(cls, batch: Batch, rows: Sequence[int]) -> Packing:
        """Every token of the padded batch in its place."""
        count, width = batch.input_ids.shape
        return cls(torch.full((count,), width), torch.zeros(count, dtype=torch.long), rows, width)

    def _lay(self, width: int) -> None:
        at = torch.arange(width)
        self.width = width
        real = at < self.lengths[:, None]  # [R, T]
        self._own = real & (at >= self.shared[:, None])
        rank = self._own.flatten().cumsum(0).view(real.shape) - 1
        first = _firsts([b - a for a, b in pairwise(self.rows)])
        place = torch.where(at < self.shared[:, None], rank[first], rank)
        # What stands in padding is never read: any token will do.
        self._place = torch.where(real, place, place[:, :1])
        self._start = rank[first, 0].tolist()  # of a row's client
        self.size = int(rank[-1, -1]) + 1  # N
        self.tokens = [0, *(rank[[b - 1 for b in self.rows[1:]], -1] + 1).tolist()]
        self.padded = self._layout([(range(len(real)), width)])
        self.blocks = self._blocks()
        self.attended = self.padded if len(self.blocks) == 1 else self._layout(self.blocks)
        self.real = [real[list(rows), :wide][:, None, None].to(self.device) for rows, wide in self.blocks]

    def _blocks(self) -> list[tuple[Sequence[int], int]]:
        """Rows of similar length, and the longest length of each: what attention works on at once.

        On a GPU it is one block, as a small product takes as long as a large one there; with dropout too, as masks are
        drawn for all rows of a client together.
        """
        everybody = (range(len(self.lengths)), self.width)
        if self.draws is not None or self.device.type == "cuda":
            return [everybody]
        rows: dict[int, list[int]] = defaultdict(list)
        for row, length in enumerate(self.lengths.tolist()):
            rows[-(-length // STEP)].append(row)
        return [(own, int(self.lengths[own].max())) for own in rows.values()] if len(rows) > 1 else [everybody]

    def _layout(self, blocks: Sequence[tuple[Sequence[int], int]]) -> Layout:
        """Where tokens lie when these rows stand one below the other, each block padded to its own width."""
        base, offset = {}, 0
        for rows, wide in blocks:
            for one in rows:
                base[one] = offset
                offset += wide
        places = [self._place[list(rows), :wide].flatten() for rows, wide in blocks]
        row, t = self._own.nonzero().unbind(1)
        starts = torch.tensor([base[r] for r in range(len(base))])
        copies = [(base[r], self._start[r], n) for r, n in enumerate(self.shared.tolist()) if n]
        return Layout(torch.cat(places).to(self.device), (starts[row] + t).to(self.device), copies)

    def widen(self, width: int) -> None:
        """Make room for vectors that every row has before or among its tokens, such as a soft prompt."""
        if width > self.width:
            more = width - self.width
            later = torch.ones(len(self.lengths), dtype=torch.bool)
            later[self.rows[:-1]] = False
            # A client's rows have its prompt in common too, where they may have anything in common.
            self.shared = self.shared + more * later * (self.shared > 0)
            self.lengths = self.lengths + more
            self._lay(width)

    def pays(self) -> bool:
        """Whether enough is saved to make up for the moving."""
        return self.draws is not None or self.size < 0.95 * len(self.lengths) * self.width


def _firsts(rows: Sequence[int]) -> torch.Tensor:
    """For each row, the first row of its client, ``[R]``."""
    counts = torch.tensor(list(rows))
    return (counts.cumsum(0) - counts).repeat_interleave(counts)


class _Spread(torch.autograd.Function):
    """``[N, D]`` to ``[M, D]``."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        ctx.layout = layout
        return x.index_select(0, layout.place)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        [grad] = grads
        out = grad.index_select(0, ctx.layout.slots)
        for at, start, n in ctx.layout.copies:
            out[start : start + n] += grad[at : at + n]
        return out, None


class _Collect(torch.autograd.Function):
    """``[M, D]`` to ``[N, D]``."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        ctx.layout = layout
        return x.index_select(0, layout.slots)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        [grad] = grads
        out = grad.new_zeros(len(ctx.layout.place), grad.shape[1])
        return out.index_copy_(0, ctx.layout.slots, grad), None


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within each row of the packing that is in use; ``[1, H, N, D]`` each, gives ``[1, N, H, D]``.

    Raises:
        ValueError: attention of a kind that is not understood here.
    """
    packing = _now
    odd = [k for k, v in others.items() if v is not None and k not in _HARMLESS]
    if packing is None or odd or query.shape[2] != packing.size or key.shape[2] != packing.size:
        raise ValueError(f"attention in a packed batch with {', '.join(odd) or 'tokens that are not in it'}")
    heads = query.shape[1]

    def flat(x: torch.Tensor) -> torch.Tensor:
        """``[M, H*D]``."""
        return _Spread.apply(x[0].transpose(0, 1).reshape(packing.size, -1), packing.attended)

    q, k, v = flat(query), flat(key), flat(value)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    found, at = [], 0
    for (rows, wide), real in zip(packing.blocks, packing.real, strict=True):
        part = slice(at, at := at + len(rows) * wide)
        shape = len(rows), wide, -1, query.shape[3]
        one, two, three = (x[part].view(shape).transpose(1, 2) for x in (q, k, v))  # [R, H, T, D]
        mask = None if causal else real  # what follows a row's end is seen by nobody who looks only back
        if dropout and module.training:
            out = _with_dropout(one, two, three, mask, scaling, dropout, packing)
        else:
            grouped = heads != key.shape[1]
            out = F.scaled_dot_product_attention(
                one, two, three, mask, is_causal=causal, scale=scaling, enable_gqa=grouped
            )
        found.append(out.transpose(1, 2).reshape(len(rows) * wide, -1))
    whole = torch.cat(found) if len(found) > 1 else found[0]  # [M, H*D]
    return _Collect.apply(whole, packing.attended).view(1, packing.size, heads, -1), None


def _with_dropout(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    p: float,
    packing: Packing,
) -> torch.Tensor:
    """Attention whose weights are dropped by each client's own masks; ``[R, H, T, D]``."""
    assert packing.draws is not None
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    scores = q @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scaling is None else scaling)
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(3)  # [R, H, T, T]
    return packing.draws.square(weights, p, packing) @ v


class Packer:
    """A model whose blocks can be given packed batches.

    Args:
        loaded: the model.
        looks_back: whether a token's hidden state depends on no later token.
    """

    def __init__(self, loaded: Loaded, looks_back: bool) -> None:
        self.looks_back = looks_back
        self._model = loaded.model
        path, _, self._name = loaded.architecture.blocks.rpartition(".")
        self._parent = attrgetter(path)(loaded.model) if path else loaded.model
        self._blocks = list(getattr(self._parent, self._name))
        self._gated = gated(self._model)

    @classmethod
    def of(cls, loaded: Loaded) -> Packer | None:
        """``None`` where packing changes what the model computes, as is tried out on a few tokens."""
        from transformers import AttentionInterface

        config: Any = loaded.model.config
        if not loaded.architecture.blocks or loaded.tokenizer is None or getattr(config, "sliding_window", None):
            return None
        AttentionInterface.register(NAME, attention)
        model, words = loaded.model, config.get_text_config().vocab_size
        device, training = next(model.parameters()).device, model.training
        ids = torch.tensor([[4, 5, 6, 7, 8, 9], [4, 5, 9, 6, 0, 0], [6, 4, 5, 0, 0, 0]]) % words
        probe = Batch.of(ids, torch.tensor([6, 4, 3]), torch.zeros(3))
        given = {"input_ids": ids.to(device), "attention_mask": probe.mask.to(device)}
        model.eval()
        try:
            packer = cls(loaded, looks_back(model.base_model))
            with torch.no_grad():
                wanted = model.base_model(**given).last_hidden_state
                with packer.packed(Packing.of(probe, [2, 1], packer.looks_back, device=device)):
                    got = model.base_model(**given).last_hidden_state
        except (TypeError, AttributeError, ValueError, RuntimeError, KeyError, IndexError):
            return None  # the model reads its batch in another way
        finally:
            model.train(training)
        real = probe.mask.bool().to(device)
        return packer if torch.allclose(got[real], wanted[real], rtol=1e-3, atol=1e-4) else None

    @contextmanager
    def packed(self, packing: Packing, first: int = 0) -> Iterator[None]:
        """Within it, the model's blocks from ``first`` on work on the packed batch."""
        global _now
        config: Any = self._model.config
        usual, before = config._attn_implementation, _now
        blocks = self._blocks[first:]
        seen: dict[int, tuple[Any, Any]] = {}

        def enter(block: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
            hidden, *more = args or (given.pop("hidden_states"),)
            if block is blocks[0]:
                packing.widen(hidden.shape[1])
                hidden = _Collect.apply(hidden.flatten(0, 1), packing.padded)[None]
            given = {k: None if k == "attention_mask" else narrow(v) for k, v in given.items()}
            return (hidden, *(narrow(v) for v in more)), given

        def narrow(value: Any) -> Any:
            """What the model gives to each of its blocks, for the tokens that are computed."""
            if isinstance(value, tuple | list):
                return type(value)(map(narrow, value))
            if not torch.is_tensor(value) or value.dim() < 2 or value.shape[1] != packing.width:
                return None if torch.is_tensor(value) and value.dim() == 4 else value
            if id(value) not in seen:
                if value.shape[0] == 1:
                    own = value[0].index_select(0, packing.padded.slots % packing.width)
                else:
                    own = value.flatten(0, 1).index_select(0, packing.padded.slots)
                seen[id(value)] = value, own[None]
            return seen[id(value)][1]

        def leave(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            wide = _Spread.apply(hidden[0], packing.padded).view(len(packing.lengths), packing.width, -1)
            return (wide, *output[1:]) if isinstance(output, tuple) else wide

        hooks = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks]
        hooks.append(blocks[-1].register_forward_hook(leave))
        config._attn_implementation, _now = NAME, packing
        try:
            with lean(self._gated):
                yield
        finally:
            config._attn_implementation, _now = usual, before
            for hook in hooks:
                hook.remove()
