"""Half of the bytes: numbers travel as bfloat16.

bfloat16 has the exponents of float32 and 8 significant bits instead of 24, so what is small or large keeps its size and
loses digits alone. It is the plainest of compressions: no draw, no memory, the same error for every coordinate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedfm.core.traits import Trait, Traits
from fedfm.core.update import Tensors, Update
from fedfm.errors import BadUpdate
from fedfm.wire import packing
from fedfm.wire.stage import Sender, Setting, Stage


@dataclass(frozen=True)
class Half(Stage):
    """$Q(x) = x (1 + \\delta)$ with $|\\delta| \\le 2^{-8}$ for each coordinate $x$ of float32 that is not smaller than
    $2^{-126}$; the nearest, and of two equally near ones the one whose last bit is 0. The server works with float32.

    Integer tensors travel as they are.
    """

    id: ClassVar[str] = "half"
    packs: ClassVar[bool] = True
    # A coordinate may be rounded away from zero.
    breaks: ClassVar[Traits] = frozenset({Trait.BOUNDED})

    def fits(self, setting: Setting) -> None:
        packing.must_be_last(self, setting)

    def send(self, update: Update, sender: Sender) -> Update:
        return replace(update, tensors=_floats(update.tensors, torch.bfloat16))

    def receive(self, update: Update, like: Tensors | None) -> Update:
        for name, tensor in update.tensors.items():
            if tensor.is_floating_point() and tensor.dtype != torch.bfloat16:
                raise BadUpdate(f"tensor {name!r} holds {tensor.dtype}, not torch.bfloat16")
        return replace(update, tensors=_floats(update.tensors, torch.float32))


def _floats(tensors: Tensors, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors with all floating-point numbers in another type."""
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
