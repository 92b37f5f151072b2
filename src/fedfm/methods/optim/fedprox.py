"""FedProx: Li et al. 2020, Federated Optimization in Heterogeneous Networks (arXiv 1812.06127).

A proximal term holds local weights near the global ones, so that clients may do different amounts of work: stragglers
send what they have instead of being dropped.

Differences from the paper:
- The mean is weighted by examples over uniformly drawn clients; the paper draws clients by their number of examples and
  averages uniformly. Both have the same expectation.
- How much work a client does is said by ``work`` of its profile (a factor on its local steps), not drawn anew each
  round.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from fedfm.core.jobs import Term
from fedfm.core.method import Client, Method, Paper
from fedfm.core.terms import Proximal
from fedfm.core.update import Tensors
from fedfm.errors import require


@dataclass(frozen=True)
class FedProx(Method):
    """$w_k \\approx \\arg\\min_v F_k(v) + \\frac{\\mu}{2} \\lVert v - w \\rVert^2$.

    Args:
        mu: $\\mu$; the paper's grid is 0.001, 0.01, 0.1, 1.
    """

    paper: ClassVar[Paper | None] = Paper(
        title="Federated Optimization in Heterogeneous Networks",
        authors="Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith",
        year=2020,
        venue="MLSys",
        arxiv="1812.06127",
    )

    mu: float = 0.01

    def __post_init__(self) -> None:
        require(self, "mu", 0 <= self.mu < math.inf, "at least 0 and finite")

    def terms(self, client: Client, message: Tensors) -> tuple[Term, ...]:
        """The proximal term around what was received."""
        return (Proximal(self.mu, message),) if self.mu else ()
