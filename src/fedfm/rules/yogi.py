"""Yogi on the server: Reddi et al. 2021, Adaptive Federated Optimization, ICLR 2021 (arXiv 2003.00295), FedYogi.

As Adam, but the scale moves towards the square of the change by steps whose size depends on that square alone, so one
small change after many large ones does not let it fall fast.

Differences from the paper:
- The paper tunes $\\eta$ and $\\tau$ for each task; the defaults are values that it finds good for several,
  $\\eta = 10^{-1}$ and $\\tau = 10^{-3}$.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fedfm.rules.adaptive import Adaptive, decay


@dataclass(frozen=True)
class Yogi(Adaptive):
    """$v \\leftarrow v - (1 - \\beta_2) \\Delta^2 \\operatorname{sign}(v - \\Delta^2)$; the rest as in
    :mod:`fedfm.rules.adaptive`.

    Args:
        learning_rate: $\\eta$.
        beta1: $\\beta_1$, at least 0 and below 1.
        tau: $\\tau$, degree of adaptivity.
        beta2: $\\beta_2$, at least 0 and below 1.
    """

    id: ClassVar[str] = "yogi"

    beta2: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        decay("beta2", self.beta2)

    def second(self, v: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        return v - (1 - self.beta2) * square * torch.sign(v - square)
