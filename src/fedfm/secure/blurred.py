"""Sums of integers of which a quorum of clients must be part, so that these can add noise to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedfm.errors import require
from fedfm.secure.fixed_point import FixedPoint
from fedfm.secure.noisy_point import NoisyPoint
from fedfm.secure.secure import Secure
from fedfm.wire.distributed_gaussian import DistributedGaussian
from fedfm.wire.gaussian import bound
from fedfm.wire.stage import Stage


@dataclass(frozen=True)
class Blurred(Secure):
    """Subclasses see to it that no sum over fewer is opened.

    Args:
        threshold: part of the clients of a round of whom more must be in a sum.
    """

    blurs: ClassVar[bool] = True

    threshold: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "threshold", 0.5 <= self.threshold < 1, "at least 0.5 and below 1")

    def code(self, stages: Sequence[Stage]) -> FixedPoint:
        """How values become integers behind these stages, one of which may add noise to the integers."""
        for stage in stages:
            if isinstance(stage, DistributedGaussian):
                return NoisyPoint(self.bits, bound(stage, stages), 1, stage.noise_multiplier, self.threshold)
        return super().code(stages)
