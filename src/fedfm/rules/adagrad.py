"""Adagrad on the server: Reddi et al. 2021, Adaptive Federated Optimization, ICLR 2021 (arXiv 2003.00295), FedAdagrad.

The sum of the squares of all changes so far scales each coordinate's step, so rare coordinates take larger ones.

Differences from the paper:
- The paper tunes $\\eta$ and $\\tau$ for each task; the defaults are values that it finds good for several,
  $\\eta = 10^{-1}$ and $\\tau = 10^{-3}$.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fedfm.rules.adaptive import Adaptive


@dataclass(frozen=True)
class Adagrad(Adaptive):
    """$v \\leftarrow v + \\Delta^2$; the rest as in :mod:`fedfm.rules.adaptive`.

    Args:
        learning_rate: $\\eta$.
        beta1: $\\beta_1$; 0 as in the paper's experiments.
        tau: $\\tau$, degree of adaptivity.
    """

    id: ClassVar[str] = "adagrad"

    beta1: float = 0.0

    def second(self, v: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        return v + square
