"""The frozen lower blocks of a model, run once per example instead of once per step.

When a space tunes upper blocks alone, what enters the lowest tuned block never changes: it is computed the first time
an example is seen and kept. Training and scoring then cost only the blocks from there on.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fedfm.spaces.space import Attached
from fedfm.tasks.task import Example

if TYPE_CHECKING:
    from fedfm.models import Loaded


class _Reached(Exception):
    """Carries what enters the first block above the trunk; the forward need not go on."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _Skipped(nn.Module):
    """Stands for a trunk block: hands its input on, and has the attributes by which its model looks after blocks."""

    def __init__(self, block: nn.Module, tuples: bool) -> None:
        super().__init__()
        self._tuples = tuples
        self.attention_type = getattr(block, "attention_type", None)

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden,) if self._tuples else hidden


class Trunk:
    """The blocks below the lowest one that a space tunes.

    Args:
        loaded: the model.
        first: index of the lowest tuned block.
        tuples: whether blocks return tuples.
        limit: bytes kept; the examples used longest ago go first.
    """

    def __init__(self, loaded: Loaded, first: int, tuples: bool, limit: int = 1 << 30) -> None:
        path, _, self._name = loaded.architecture.blocks.rpartition(".")
        self._model = loaded.model
        self.first = first
        self._limit = limit
        self._bytes = 0
        self._held: OrderedDict[tuple[bytes, bool], torch.Tensor] = OrderedDict()
        self._parent = attrgetter(path)(loaded.model) if path else loaded.model
        self._blocks: nn.ModuleList = getattr(self._parent, self._name)
        self._entry = self._blocks[first]
        self._short = nn.ModuleList([_Skipped(b, tuples) for b in self._blocks[:first]] + list(self._blocks[first:]))

    @classmethod
    def below(cls, loaded: Loaded, space: Attached) -> Trunk | None:
        """The trunk of a model with this space in it; ``None`` when there is none or it may not be cached.

        It may not when the trunk draws dropout, or when skipping it changes what the model computes, as is tried out on
        a few tokens.
        """
        path = loaded.architecture.blocks
        blocks = attrgetter(path)(loaded.model) if path else ()
        tuned = {id(p) for p in space.parameters.values()}
        homes = [n for n, p in loaded.model.named_parameters() if id(p) in tuned]
        found = [re.match(rf"{re.escape(path)}\.(\d+)\.", name) for name in homes]
        above = [name for name, hit in zip(homes, found, strict=True) if hit is None]
        first = min((int(hit[1]) for hit in found if hit), default=len(blocks))
        # A tuned tensor outside the blocks must lie above them: a head, not an embedding.
        if not 0 < first < len(blocks) or any("embed" in name or "wte" in name for name in above):
            return None
        if any(isinstance(m, nn.Dropout) and m.p > 0 for block in blocks[:first] for m in block.modules()):
            return None
        if any(v for k, v in vars(loaded.model.config).items() if "drop" in k and isinstance(v, float)):
            return None
        device = next(loaded.model.parameters()).device
        with torch.no_grad():
            ids = torch.arange(3, 11, device=device)[None] % loaded.model.config.vocab_size
            wanted = loaded.model.eval()(input_ids=ids, use_cache=False).logits
            for tuples in (False, True):
                trunk = cls(loaded, first, tuples)
                try:
                    with trunk.skipped(trunk._hidden(ids)):
                        got = loaded.model(input_ids=ids, use_cache=False).logits
                except (TypeError, AttributeError, ValueError, RuntimeError):
                    continue  # the model reads its blocks in another way
                if torch.equal(got, wanted):
                    return trunk
        return None

    def of(self, examples: Sequence[Example]) -> torch.Tensor:
        """What enters the lowest tuned block for these examples, padded with zeros at the end, ``[B, T, D]``.

        Each example goes through the trunk alone, so that its numbers depend on nothing else: not on its neighbours,
        and not on whether the run was resumed.
        """
        return nn.utils.rnn.pad_sequence([self._one(example) for example in examples], batch_first=True)

    def _one(self, example: Example) -> torch.Tensor:
        """``[T, D]`` of one example, from memory if it is there."""
        device = next(self._model.parameters()).device
        key = (example.input_ids.numpy().tobytes(), torch.is_autocast_enabled(device.type))
        if key not in self._held:
            with torch.no_grad():
                hidden = self._hidden(example.input_ids[None].to(device))[0].clone()
            self._held[key] = hidden
            self._bytes += hidden.nbytes
            while self._bytes > self._limit and len(self._held) > 1:
                self._bytes -= self._held.popitem(last=False)[1].nbytes
        self._held.move_to_end(key)
        return self._held[key]

    @contextmanager
    def skipped(self, hidden: torch.Tensor) -> Iterator[None]:
        """Within it, the model starts at the lowest tuned block with ``hidden``."""
        handle = self._entry.register_forward_pre_hook(lambda block, args: (hidden, *args[1:]))
        setattr(self._parent, self._name, self._short)
        try:
            yield
        finally:
            setattr(self._parent, self._name, self._blocks)
            handle.remove()

    def _hidden(self, input_ids: torch.Tensor) -> torch.Tensor:
        def stop(block: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            raise _Reached(args[0])

        handle = self._entry.register_forward_pre_hook(stop)
        try:
            self._model(input_ids=input_ids, use_cache=False)
        except _Reached as reached:
            return reached.hidden
        finally:
            handle.remove()
        raise RuntimeError("the model did not run its blocks")
