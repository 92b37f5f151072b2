"""Poisson sampling: each client takes part by its own coin.

The sampling that the moments accountant assumes (Abadi et al. 2016, arXiv 1607.00133; McMahan et al. 2018,
arXiv 1710.06963).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedfm.core import seeds
from fedfm.core.traits import Part
from fedfm.errors import RecipeError


@dataclass(frozen=True)
class Poisson(Part):
    """Each of the $K$ clients takes part with probability $q$, independently; a round may be empty.

    Args:
        rate: $q$, above 0 and at most 1.
    """

    id: ClassVar[str] = "poisson"

    rate: float

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise RecipeError(f"sampler.rate must be above 0 and at most 1, but is {self.rate}.")

    def sample(self, ids: Sequence[str], round: int, seed: int) -> list[str]:
        """The participants of a round, in the order of ``ids``."""
        # The number is binomial and, given it, all subsets are equally likely: work for the chosen alone.
        draw = seeds.numpy_generator(seed, round, "sampler")
        m = int(draw.binomial(len(ids), self.rate))
        return [ids[int(i)] for i in sorted(draw.choice(len(ids), size=m, replace=False, shuffle=False))]

    def expected(self, population: int) -> float:
        """$qK$."""
        return self.rate * population
