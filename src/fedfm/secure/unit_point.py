"""Vectors of length 1 as integers of 64 bits, in which products and weighted sums of them are exact."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from fedfm.core.update import Update
from fedfm.errors import BadUpdate
from fedfm.secure.fixed_point import FixedPoint, Ring, Vector
from fedfm.secure.masks import stream

PROJECTIONS = 64
"""Subsets of coordinates whose sums are looked at."""
FAR = 8
"""A sum of coordinates with signs by chance is longer than this times the vector with a probability below 3e-14."""


@dataclass(frozen=True)
class UnitPoint(FixedPoint):
    """$q(\\Delta / \\lVert \\Delta \\rVert)$ with $M = 1$: integers of at most $L$, whose squares add up to $L^2$ at
    most."""

    def width(self, clients: int) -> int:
        return 8

    def encode(self, update: Update, ring: Ring) -> Vector:
        """The vector of an update of any length.

        Raises:
            BadUpdate: as of :meth:`FixedPoint.encode`, or it has no direction.
        """
        length = math.sqrt(math.fsum(float(t.double().square().sum()) for t in update.tensors.values()))
        if not 0 < length < math.inf:
            raise BadUpdate(f"its update has the length {length:g}, and so no direction")
        tensors: dict[str, torch.Tensor] = {name: t.double() / length for name, t in update.tensors.items()}
        return super().encode(replace(update, tensors=tensors, weight=1.0), ring)

    def unit(self, square: int, values: int) -> bool:
        """Whether a vector of so many values whose squares add up to this has the length 1, as far as it is rounded:
        towards zero, by less than a level in each value.

        Args:
            square: as an integer.
            values: how many.
        """
        short = max(0.0, self.levels - math.sqrt(values))
        return short**2 <= square <= self.levels**2

    def short(self, sums: np.ndarray, values: int) -> bool:
        """Whether sums over subsets of coordinates can be those of a vector of length 1.

        A vector passes by chance with a probability below 2e-6 if it is longer than 16; so the squares of what passes
        add up to less than the ring has room for.

        Args:
            sums: over each subset, and over all: ``[m + 1]``, int64.
            values: d, of the vector.
        """
        some, whole = sums[:-1].astype(object), int(sums[-1])
        # By Cauchy, sums over a subset are below sqrt(d); a value above twice that leads out of it half of the time.
        inside = all(abs(one) <= math.sqrt(values) * self.levels for one in (*some, whole))
        # With signs by chance; a longer vector's sum is above half of its length with a probability of 3/16 at least.
        return inside and all(abs(2 * one - whole) <= FAR * self.levels for one in some)


def projected(vectors: np.ndarray, seed: bytes) -> np.ndarray:
    """The sums of coordinates over subsets by chance and over all: ``[n, m + 1]`` out of ``[n, d]``, modulo the ring.

    Args:
        vectors: in the ring.
        seed: 32 bytes, drawn after the vectors were fixed.
    """
    count, length = vectors.shape
    size = -(-length // 8)
    bits = np.frombuffer(stream(seed, PROJECTIONS * size), np.uint8).reshape(PROJECTIONS, size)
    out = np.empty((count, PROJECTIONS + 1), vectors.dtype)
    for place, row in enumerate(bits):
        out[:, place] = vectors @ np.unpackbits(row, count=length).astype(vectors.dtype)
    out[:, -1] = vectors.sum(1, dtype=vectors.dtype)
    return out
