"""QSGD: Alistarh et al. 2017, QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding, NeurIPS 2017
(arXiv 1610.02132).

Each coordinate is rounded at random to one of a few fractions of its tensor's norm, so that it is right on average.

Differences from the paper:
- A bucket, the coordinates that share a norm, is a whole tensor; the paper's buckets are vectors of a fixed length.
- Levels travel in 2, 4, 8 or 16 bits, whichever is the least that holds them, and not in Elias codes: the size of an
  upload then tells nothing of its values, and packing is cheap.
- The paper quantises gradients; here it is the changes of the weights after some local steps, as in FedPAQ.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedfm.core import trees
from fedfm.core.method import Paper
from fedfm.core.traits import Trait, Traits
from fedfm.core.update import Tensors, Update
from fedfm.errors import BadUpdate, RecipeError
from fedfm.wire import packing
from fedfm.wire.stage import Sender, Setting, Stage

LEVELS, NORMS = "qsgd-levels", "qsgd-norms"


@dataclass(frozen=True)
class QSGD(Stage):
    """$Q_s(x)_i = \\lVert x \\rVert_2 \\operatorname{sign}(x_i) \\, \\xi_i$ with $\\xi_i \\in \\{0, 1/s, ..., 1\\}$ and
    $\\mathbb{E} \\xi_i = |x_i| / \\lVert x \\rVert_2$, for each tensor $x$; the server works with float32.

    Integer tensors, such as positions of a stage before, travel as they are.

    Args:
        levels: $s$, at least 1 and at most 32767. A value takes 2 bits when it is 1, 4 up to 7, 8 up to 127, else 16.
    """

    paper: ClassVar[Paper | None] = Paper(
        title="QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding",
        authors="Alistarh, Grubic, Li, Tomioka, Vojnovic",
        year=2017,
        venue="NeurIPS",
        arxiv="1610.02132",
    )
    id: ClassVar[str] = "qsgd"
    packs: ClassVar[bool] = True
    breaks: ClassVar[Traits] = frozenset({Trait.BOUNDED})

    levels: int = 127

    def __post_init__(self) -> None:
        if not 1 <= self.levels <= 32767:
            raise RecipeError(f"QSGD levels must be at least 1 and at most 32767, but is {self.levels}.")

    @property
    def bits(self) -> int:
        """Bits of one value on the wire."""
        return next(bits for bits in (2, 4, 8, 16) if self.levels < 2 ** (bits - 1))

    def fits(self, setting: Setting) -> None:
        packing.must_be_last(self, setting)

    def send(self, update: Update, sender: Sender) -> Update:
        floats = {n: t for n, t in sorted(update.tensors.items()) if t.is_floating_point() and t.numel()}
        rest = {n: t for n, t in update.tensors.items() if n not in floats}
        norms = torch.tensor([trees.norm({n: t}) for n, t in floats.items()], dtype=torch.float32)
        if not torch.isfinite(norms).all():
            raise BadUpdate("the norm of a tensor is not finite, so it cannot be quantised")
        levels = [self._levels(t, norm, sender.draw) for t, norm in zip(floats.values(), norms, strict=True)]
        flat = torch.cat(levels) if levels else torch.zeros(0, dtype=torch.int32)
        packed = flat.short() if self.bits == 16 else packing.pack((flat + self.levels).byte(), self.bits)
        return replace(update, tensors={**rest, **packing.placeholders("qsgd", floats), LEVELS: packed, NORMS: norms})

    def receive(self, update: Update, like: Tensors | None) -> Update:
        shapes = packing.shapes("qsgd", update.tensors, None)  # of what the stage before sent, unlike ``like``
        d = packing.total(shapes)
        size = d if self.bits == 16 else -(-d * self.bits // 8)
        packed = packing.part(update.tensors, LEVELS, (torch.int16 if self.bits == 16 else torch.uint8,), size)
        norms = packing.part(update.tensors, NORMS, (torch.float32,), len(shapes))
        flat = packed.int() if self.bits == 16 else packing.unpack(packed, self.bits, d).int() - self.levels
        if not bool((torch.isfinite(norms) & (norms >= 0)).all()) or not bool((flat.abs() <= self.levels).all()):
            raise BadUpdate(f"{LEVELS!r} or {NORMS!r} hold what QSGD with {self.levels} levels never sends")
        ours = {f"qsgd:{name}" for name in shapes} | {LEVELS, NORMS}
        tensors = {n: t for n, t in update.tensors.items() if n not in ours}
        values = flat.split([shape.numel() for shape in shapes.values()])
        for (name, shape), level, norm in zip(shapes.items(), values, norms, strict=True):
            tensors[name] = (level.float() * (norm / self.levels)).view(shape)
        return replace(update, tensors=tensors)

    def _levels(self, tensor: torch.Tensor, norm: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
        """Signed levels, from $-s$ to $s$, of a tensor of d scalars: ``[d]``, int32."""
        x = trees.wide(tensor).flatten()
        scaled = (x.abs() / norm.to(x) * self.levels) if norm > 0 else torch.zeros_like(x)
        below = scaled.floor()
        up = torch.rand(x.shape, generator=draw, device=draw.device, dtype=x.dtype).to(x.device) < scaled - below
        # Rounding of the norm can put the only coordinate of a tensor a bit above the highest level.
        return ((below + up).clamp(max=self.levels) * x.sign()).int()
