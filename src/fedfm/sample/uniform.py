"""Sampling of a fixed number of clients, without replacement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedfm.core import seeds
from fedfm.core.traits import Part
from fedfm.errors import RecipeError


@dataclass(frozen=True)
class Uniform(Part):
    """Draw $m = \\max(C \\cdot K, 1)$ of the $K$ clients, all subsets of that size being equally likely.

    Args:
        fraction: $C$, above 0 and at most 1.
        count: $m$ itself; 0 means ``fraction`` decides.
    """

    id: ClassVar[str] = "uniform"

    fraction: float = 1.0
    count: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise RecipeError(f"sampler.fraction must be above 0 and at most 1, but is {self.fraction}.")
        if self.count < 0:
            raise RecipeError(f"sampler.count must be at least 1, or 0 to use fraction; it is {self.count}.")

    def sample(self, ids: Sequence[str], round: int, seed: int) -> list[str]:
        """The participants of a round, in the order of ``ids``."""
        m = int(self.expected(len(ids)))
        if m == len(ids):
            return list(ids)
        chosen = seeds.numpy_generator(seed, round, "sampler").choice(len(ids), size=m, replace=False, shuffle=False)
        return [ids[int(i)] for i in sorted(chosen)]

    def expected(self, population: int) -> float:
        """$m$."""
        return min(self.count or max(1, round(self.fraction * population)), population)
