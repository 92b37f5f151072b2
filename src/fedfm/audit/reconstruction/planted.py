"""Weights that a server hands out so that the gradient of one layer holds what each token was: of BERT and of Llama.

In all of them entry 0 of what enters the measuring layer is a constant, some entries after it hold a code of the row,
and the rest is what the token is known by. The blocks above pass on one direction alone, and in the last one every
position is given the mean of it, so that each token's gradient reaches the loss.

Letters in shapes: N tokens, T tokens of a row, D width, C width of the code, V tokens of the vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from fedfm.core.update import Tensors

CONSTANT = 4.0
"""Entry 0, in units of the spread of the others."""
STEEP = 8.0
"""Times the number of thresholds: the slope of a unit in units of the spread of what is measured, so that neighbouring
thresholds stand about ten steps of the activation apart."""
SMALL = 100.0
"""Factor by which the weights of the measuring layer are smaller, and what enters it larger: a change of small weights
by a large gradient is least rounded."""
FAINT = 0.1
"""Scale of a classifier's scores: all classes stay about as likely, so that what a label pulls with is known."""
SHARE = 0.3
"""How much the measuring block adds, at most, in units of the spread of what it is added to."""
AVERAGED = 3.0
"""Weight of the mean over positions in the last block."""


def signs(units: int) -> torch.Tensor:
    """Of the units in the sum, so that it stays small whatever is measured, ``[units]``."""
    return torch.tensor([1.0, -1.0, -1.0, 1.0]).repeat(units // 4 + 1)[:units]


@dataclass(frozen=True)
class Measure:
    """What is measured.

    Args:
        direction: $m$ over what the token is known by, ``[D]``; 0 elsewhere.
        out: the direction that the blocks above pass on, ``[D]``.
        thresholds: $q$, rising, one for each unit.
        gain: what the units add for what is added to them, so that it is at most :data:`SHARE`.
    """

    direction: torch.Tensor
    out: torch.Tensor
    thresholds: torch.Tensor
    gain: float

    @property
    def steep(self) -> float:
        """Slope of the units."""
        return STEEP * len(self.thresholds)

    @property
    def long(self) -> float:
        """How much what enters the layer is enlarged."""
        return self.steep * SMALL


@dataclass(frozen=True)
class Planted(ABC):
    """A family of models.

    Args:
        blocks: path of its blocks.
        config: of the model.
    """

    families: ClassVar[tuple[str, ...]]
    causal: ClassVar[bool]

    blocks: str
    config: Any

    @property
    def width(self) -> int:
        """D."""
        return int(self.config.hidden_size)

    @property
    def coded(self) -> int:
        """C."""
        # Of Llama's heads only those of one group see the code.
        return max(2, min(8, self.width // 8, self.width // int(self.config.num_attention_heads)))

    @property
    def known(self) -> slice:
        """Entries by which a token is known."""
        return slice(1 + self.coded, self.width)

    @property
    def code(self) -> slice:
        """Entries of the code."""
        return slice(1, 1 + self.coded)

    @property
    def source(self) -> slice:
        """Entries of tokens whose mean is the code of their row, or of its beginning."""
        return slice(1 + self.coded, 1 + 2 * self.coded)

    @property
    def units(self) -> int:
        """Of the measuring layer."""
        return int(self.config.intermediate_size)

    def block(self, number: int, path: str) -> str:
        """Name of a tensor."""
        return f"{self.blocks}.{number}.{path}"

    @property
    def last(self) -> int:
        """Number of the last block."""
        return int(self.config.num_hidden_layers) - 1

    @property
    @abstractmethod
    def measured(self) -> str:
        """Name of the weight whose gradient is read."""

    @property
    @abstractmethod
    def needed(self) -> tuple[str, ...]:
        """Names of tensors that the server must set."""

    @abstractmethod
    def weights(self, message: Tensors, found: Measure) -> Tensors:
        """What is handed out instead.

        Args:
            message: what should be.
            found: what is measured.
        """

    @abstractmethod
    def tokens(self, start: Tensors, ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """What tokens at places are before their row's code is added, ``[..., D]``, entry 0 and the code's without
        meaning.

        Args:
            start: tensors as they were handed out, or should be.
            ids: token ids.
            places: in their rows.
        """

    @abstractmethod
    def entering(self, rows: torch.Tensor) -> torch.Tensor:
        """What enters the measuring layer for whole rows ``[N, T, D]``, in units of the spread of what tokens are
        known by."""

    @abstractmethod
    def codes(self, found: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The code of each token's row, ``[N, C]``, in the units of what it was made of.

        Args:
            found: what entered, with entry 0 as 1, ``[N, D]``.
            tokens: as :meth:`tokens` has them.
        """

    def units_of(self, found: Measure) -> torch.Tensor:
        """Weights of the measuring layer, ``[units, D]``, for what enters when it is enlarged."""
        weight = found.direction.repeat(len(found.thresholds), 1)
        weight[:, 0] = -found.thresholds / CONSTANT
        return weight / SMALL

    def adding(self, found: Measure) -> torch.Tensor:
        """Weights of the layer after it, ``[D, units]``."""
        return found.gain * found.out[:, None] * signs(len(found.thresholds))


class PlantedBert(Planted):
    """A BERT: layer norms stand after what is added, positions have embeddings of their own, and every token of a row
    sees all of them: so the code is of the whole row."""

    families: ClassVar[tuple[str, ...]] = ("bert",)
    causal: ClassVar[bool] = False

    @property
    def measured(self) -> str:
        return self.block(0, "intermediate.dense.weight")

    @property
    def needed(self) -> tuple[str, ...]:
        inner = ("attention.self.query.weight", "attention.self.value.weight", "attention.output.dense.weight")
        norms = (self.block(0, "attention.output.LayerNorm.weight"), f"{self.tables}.LayerNorm.weight")
        own = (self.measured, self.block(0, "output.dense.weight"), *norms)
        return *own, *(self.block(number, path) for number in (0, self.last) for path in inner)

    @property
    def tables(self) -> str:
        """Path of the embeddings."""
        return self.blocks.removesuffix("encoder.layer") + "embeddings"

    def weights(self, message: Tensors, found: Measure) -> Tensors:
        none = {name: torch.zeros_like(message[name]) for name in self._silent(message)}
        plain = {n: torch.ones_like(t) for n, t in message.items() if n.endswith("LayerNorm.weight")}
        plain |= {n: torch.zeros_like(t) for n, t in message.items() if n.endswith("LayerNorm.bias")}
        plain[f"{self.tables}.LayerNorm.weight"][: 1 + self.coded] = 0
        norm = self.block(0, "attention.output.LayerNorm")
        plain[f"{norm}.weight"] *= found.long
        plain[f"{norm}.weight"][0] = 0
        plain[f"{norm}.bias"][0] = CONSTANT * found.long
        value, output = (
            [torch.zeros(self.width, self.width) for _ in range(2)] for _ in range(2)
        )  # of the first and of the last block
        value[0][range(self.coded), range(1 + self.coded, 1 + 2 * self.coded)] = 1
        output[0][range(1, 1 + self.coded), range(self.coded)] = 1
        value[1][0] = found.out / found.out.square().sum()
        output[1][:, 0] = AVERAGED * found.out
        own = {
            self.block(0, "attention.self.value.weight"): value[0],
            self.block(0, "attention.output.dense.weight"): output[0],
            self.block(self.last, "attention.self.value.weight"): value[1],
            self.block(self.last, "attention.output.dense.weight"): output[1],
            self.measured: self.units_of(found),
            self.block(0, "output.dense.weight"): self.adding(found) * found.long,
            **self._head(message, found),
        }
        return {**none, **plain, **own}

    def _silent(self, message: Tensors) -> list[str]:
        """Names of what is 0: which positions are attended to, biases, and what the blocks add."""
        ends = ("query.weight", "query.bias", "value.bias", "output.dense.weight", "dense.bias")
        return [n for n in message if n.startswith(f"{self.blocks}.") and n.endswith(ends)]

    def _head(self, message: Tensors, found: Measure) -> Tensors:
        """A head that reads the direction alone, and by which no two classes make gradients that cancel out."""
        names = ("pooler.dense.weight", "pooler.dense.bias", "classifier.weight", "classifier.bias")
        own = {end: next((n for n in message if n.endswith(end)), "") for end in names}
        made = {name: torch.zeros_like(message[name]) for name in own.values() if name}
        if own["pooler.dense.weight"]:
            made[own["pooler.dense.weight"]][0] = FAINT * found.out / found.out.square().sum()
        if own["classifier.weight"]:
            count = len(made[own["classifier.weight"]])
            classes = torch.arange(count)
            made[own["classifier.weight"]][:, 0] = (1 - 2 * (classes % 2)) * (1 + classes / (2 * count))
        return made

    def tokens(self, start: Tensors, ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        found = (
            start[f"{self.tables}.word_embeddings.weight"][ids]
            + start[f"{self.tables}.position_embeddings.weight"][places]
            + start[f"{self.tables}.token_type_embeddings.weight"][0]
        )
        found = F.layer_norm(found, found.shape[-1:], eps=self.config.layer_norm_eps)
        found[..., : 1 + self.coded] = 0
        return found

    def entering(self, rows: torch.Tensor) -> torch.Tensor:
        rows = rows.clone()
        rows[..., self.code] = rows[..., self.source].mean(1, keepdim=True)
        found = F.layer_norm(rows, rows.shape[-1:], eps=self.config.layer_norm_eps)
        found[..., 0] = CONSTANT
        return found

    def codes(self, found: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        # What entered is scale * (token and code) + shift; what the token is known by tells both.
        mine, true = found[:, self.known], tokens[:, self.known]
        middle, centre = mine.mean(1, keepdim=True), true.mean(1, keepdim=True)
        scale = ((mine - middle) * (true - centre)).sum(1, keepdim=True)
        scale = scale / (true - centre).square().sum(1, keepdim=True).clamp_min(1e-12)
        return (found[:, self.code] - middle) / scale + centre


class PlantedLlama(Planted):
    """A Llama: no biases, so thresholds hang on entry 0, which is put into the table of token embeddings; no embeddings
    of positions; a token sees those before it alone: so the code is of the row up to it."""

    families: ClassVar[tuple[str, ...]] = ("llama", "mistral")
    causal: ClassVar[bool] = True

    @property
    def measured(self) -> str:
        return self.block(0, "mlp.gate_proj.weight")

    @property
    def needed(self) -> tuple[str, ...]:
        inner = ("self_attn.q_proj.weight", "self_attn.v_proj.weight", "self_attn.o_proj.weight")
        first = (
            "mlp.gate_proj.weight",
            "mlp.up_proj.weight",
            "mlp.down_proj.weight",
            "post_attention_layernorm.weight",
        )
        own = (self.table, *(self.block(0, path) for path in first))
        return *own, *(self.block(number, path) for number in (0, self.last) for path in inner)

    @property
    def table(self) -> str:
        """Name of the embeddings."""
        return self.blocks.removesuffix("layers") + "embed_tokens.weight"

    @property
    def usual(self) -> float:
        """Root mean square of a row of the table."""
        return float(((self.width - 1 - self.coded + CONSTANT**2) / self.width) ** 0.5)

    def weights(self, message: Tensors, found: Measure) -> Tensors:
        ends = ("q_proj.weight", "o_proj.weight", "down_proj.weight", "v_proj.weight")
        none = {n: torch.zeros_like(t) for n, t in message.items() if n.startswith(self.blocks) and n.endswith(ends)}
        plain = {n: torch.ones_like(t) for n, t in message.items() if n.endswith("layernorm.weight")}
        plain[self.block(0, "post_attention_layernorm.weight")] *= found.long
        table = self.tokens(message, torch.arange(len(message[self.table])), torch.zeros(()))
        table[:, 0] = CONSTANT
        made = {**none, **plain}
        # One group of heads sees the code, and in the last block the direction that is passed on.
        made[self.block(0, "self_attn.v_proj.weight")][range(self.coded), range(1 + self.coded, 1 + 2 * self.coded)] = (
            self.usual
        )
        made[self.block(0, "self_attn.o_proj.weight")][range(1, 1 + self.coded), range(self.coded)] = 1
        made[self.block(self.last, "self_attn.v_proj.weight")][0] = found.out / found.out.square().sum()
        made[self.block(self.last, "self_attn.o_proj.weight")][:, 0] = AVERAGED * found.out
        up = torch.zeros_like(message[self.block(0, "mlp.up_proj.weight")])
        up[:, 0] = 1 / (CONSTANT * found.long)
        return {
            **made,
            self.table: table,
            self.measured: self.units_of(found),
            self.block(0, "mlp.up_proj.weight"): up,
            self.block(0, "mlp.down_proj.weight"): self.adding(found),
        }

    def tokens(self, start: Tensors, ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        found = start[self.table][ids].clone()
        found[..., : 1 + self.coded] = 0
        long = found.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return found / long * (self.width - 1 - self.coded) ** 0.5

    def entering(self, rows: torch.Tensor) -> torch.Tensor:
        rows = rows.clone()
        counts = torch.arange(1, rows.shape[1] + 1)[:, None]
        rows[..., self.code] = rows[..., self.source].cumsum(1) / counts
        rows[..., 0] = CONSTANT
        return rows

    def codes(self, found: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return found[:, self.code] * CONSTANT


def planted(architecture: Any, config: Any) -> Planted | None:
    """The family of a model; ``None`` where it is none of them, or has one block."""
    if getattr(config, "num_hidden_layers", 0) < 2:
        return None
    kinds: Sequence[type[Planted]] = (PlantedBert, PlantedLlama)
    return next((k(architecture.blocks, config) for k in kinds if architecture.family in k.families), None)
