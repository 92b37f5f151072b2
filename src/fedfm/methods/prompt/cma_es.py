"""CMA-ES, the covariance matrix adaptation evolution strategy, as pure functions: a search in, a search out.

Hansen 2016, The CMA Evolution Strategy: A Tutorial (arXiv 1604.00772). Candidates are drawn from
$N(m, \\sigma^2 C)$; the better ones pull the mean m, the step size $\\sigma$ and the covariance C towards themselves,
the worse ones push C away. Only the order of the fitness values counts.

The package ``cma`` does the same and is what the tests compare with. It is not used here because it keeps the search in
a large object that can be stored by pickle alone, and draws from NumPy's global generator; a server's state must be
plain tensors, and draws must be functions of names. Constants and details are those of the package, version 4, where
it differs from the tutorial: $c_\\sigma$, $c_1$ for small populations, the test for $h_\\sigma$. Only the damping of
$\\sigma$ is the tutorial's; the two are equal while few candidates search many dimensions ($\\mu_{eff} < D / 9$).

Letters in shapes: D dimensions of the search, N candidates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cached_property

import torch

from fedfm.core.update import Tensors


@dataclass(frozen=True)
class Search:
    """Where a search stands. Tensors are float64.

    Args:
        mean: $m$, ``[D]``.
        sigma: $\\sigma$, the step size.
        covariance: $C$, ``[D, D]``.
        path_sigma: $p_\\sigma$, the path of the mean as a multiple of the standard deviation, ``[D]``.
        path_covariance: $p_c$, the path of the mean in steps, ``[D]``.
        generation: how many times :func:`tell` was called.
    """

    mean: torch.Tensor
    sigma: float
    covariance: torch.Tensor
    path_sigma: torch.Tensor
    path_covariance: torch.Tensor
    generation: int = 0

    @classmethod
    def start(cls, mean: torch.Tensor, sigma: float, covariance: torch.Tensor | None = None) -> Search:
        """A search without a past."""
        mean = mean.double()
        zero = torch.zeros_like(mean)
        return cls(
            mean, sigma, torch.eye(len(mean)).double() if covariance is None else covariance.double(), zero, zero
        )

    @cached_property
    def axes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Principal axes B, in columns ``[D, D]``, and standard deviations along them ``[D]``: $C = B D^2 B^T$."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return vectors, values.clamp(min=1e-20).sqrt()

    @classmethod
    def of(cls, tensors: Tensors) -> Search:
        """The search of which :attr:`tensors` tells."""
        mean, covariance, path, path_c = (
            tensors[name] for name in ("mean", "covariance", "path_sigma", "path_covariance")
        )
        return cls(mean, float(tensors["sigma"]), covariance, path, path_c, int(tensors["generation"]))

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything by name, in float64: plain tensors are what a state can hold."""
        return {f.name: torch.as_tensor(getattr(self, f.name), dtype=torch.float64) for f in fields(self)}

    def whiten(self, steps: torch.Tensor) -> torch.Tensor:
        """$C^{-1/2} y$ of every row ``[N, D]``."""
        axes, deviations = self.axes
        return (steps @ axes / deviations) @ axes.T


def ranking(size: int) -> torch.Tensor:
    """Weights of the candidates, best first, ``[N]``: $\\ln\\frac{N+1}{2} - \\ln i$, scaled so that the positive ones
    have the sum 1 and the negative ones -1."""
    weights = math.log((size + 1) / 2) - torch.arange(1, size + 1).double().log()
    return torch.where(weights > 0, weights / weights[weights > 0].sum(), weights / -weights[weights < 0].sum())


def ask(search: Search, size: int, draw: torch.Generator) -> torch.Tensor:
    """Candidates ``[N, D]``: $m + \\sigma B D z$ with z from the standard normal distribution."""
    axes, deviations = search.axes
    z = torch.randn(size, len(search.mean), generator=draw, dtype=torch.float64)
    return search.mean + search.sigma * (z * deviations) @ axes.T


def tell(search: Search, points: torch.Tensor, fitness: torch.Tensor, parents: int = 0) -> Search:
    """The search after a generation.

    Args:
        search: from which the candidates came.
        points: candidates, ``[N, D]``.
        fitness: the smaller, the better, ``[N]``.
        parents: $\\mu$, when it is not half of N: weights are then the first N of a population of $2 \\mu$.
    """
    n, d = points.shape
    weights = ranking(2 * parents or n)
    lambda_, positive = len(weights), weights[weights > 0]
    mass = float(1 / positive.square().sum())  # mu_eff, the number of parents that count
    c_sigma = min(0.5, (mass + 2) / (d + mass + 3))
    damping = 1 + 2 * max(0.0, math.sqrt((mass - 1) / (d + 1)) - 1) + c_sigma
    c_c = (4 + mass / d) / (d + 4 + 2 * mass / d)
    c_1 = min(1, lambda_ / 6) * 2 / ((d + 1.3) ** 2 + mass)
    c_mu = min(1 - c_1, 2 * (0.25 + mass + 1 / mass - 2) / ((d + 2) ** 2 + mass))
    negative = weights[weights < 0]
    worse = float(negative.sum() ** 2 / negative.square().sum()) if len(negative) else 0.0
    # Bounds of the tutorial, section 4: no decay of C, learning no faster than from parents, C positive definite.
    bound = min(1 + c_1 / c_mu, 1 + 2 * worse / (mass + 2), (1 - c_1 - c_mu) / (d * c_mu))
    weights = torch.where(weights < 0, weights * bound, weights)[:n]

    steps = (points.double()[torch.argsort(fitness, stable=True)] - search.mean) / search.sigma  # [N, D], best first
    step = weights.clamp(min=0) @ steps
    mean = search.mean + search.sigma * step

    path_sigma = (1 - c_sigma) * search.path_sigma
    path_sigma = path_sigma + math.sqrt(c_sigma * (2 - c_sigma) * mass) * search.whiten(step[None])[0]
    length = float(path_sigma.norm())
    generation = search.generation + 1
    # A path too long means that sigma is far too small; C must not learn its length meanwhile.
    go = length**2 / (1 - (1 - c_sigma) ** (2 * generation)) / d < 2 + 4 / (d + 1)
    path_c = (1 - c_c) * search.path_covariance + go * math.sqrt(c_c * (2 - c_c) * mass) * step

    whole = search.whiten(steps).square().sum(1)  # squared Mahalanobis length of each step
    scaled = torch.where(weights < 0, weights * d / (whole + 1e-300), weights)
    stays = 1 - c_1 * (1 if go else 1 - c_c * (2 - c_c)) - c_mu * float(weights.sum())
    covariance = stays * search.covariance + c_1 * torch.outer(path_c, path_c)
    covariance = covariance + c_mu * (steps.T * scaled) @ steps
    usual = math.sqrt(2) * math.exp(math.lgamma((d + 1) / 2) - math.lgamma(d / 2))  # E||N(0, I)||
    sigma = search.sigma * math.exp(min(1.0, c_sigma / damping * (length / usual - 1)))
    return Search(mean, sigma, (covariance + covariance.T) / 2, path_sigma, path_c, generation)
