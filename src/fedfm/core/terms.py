"""What methods add to the local loss. A term sees one client's tensors, whoever trains it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedfm.core.update import Tensors


@dataclass(frozen=True, eq=False)
class Proximal:
    """$\\frac{\\mu}{2} \\lVert v - c \\rVert^2$, whose gradient is $\\mu (v - c)$.

    Args:
        mu: $\\mu$.
        center: $c$; ``None`` means the weights before the first step.
    """

    mu: float
    center: Tensors | None = None

    def __call__(self, weights: Tensors, start: Tensors) -> torch.Tensor:
        center = self.center or start
        squares = [(w - center[n].to(w)).square().sum() for n, w in weights.items() if n in center]
        return self.mu / 2 * torch.stack(squares).sum()


@dataclass(frozen=True, eq=False)
class Linear:
    """$\\langle s, v \\rangle$, whose gradient is $s$ whatever the weights are.

    Args:
        slope: $s$, by name; names that are not trained are left out, and names without a slope have none.
    """

    slope: Tensors

    def __call__(self, weights: Tensors, start: Tensors) -> torch.Tensor:
        parts = [(w * self.slope[n].to(w)).sum() for n, w in weights.items() if n in self.slope]
        return torch.stack(parts).sum() if parts else torch.zeros(())
