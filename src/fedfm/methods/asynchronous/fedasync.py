"""FedAsync: Xie et al. 2019, Asynchronous Federated Optimization (arXiv 1903.03934).

Clients train with a pull towards the model they received; the server mixes each result into the model as soon as it
arrives. With FedBuff it makes the two rules of the catalogue's row ``async-staleness``; the rule itself is
:class:`fedfm.schedule.mixing.Mixing`, which names how it differs from the paper.

Differences from the paper:
- The paper tries constant, polynomial and hinge discounts; the default is the polynomial one with its power 1/2.
- The local optimizer is whatever the training arguments say; ``optim: sgd`` gives the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fedfm.core.jobs import Term
from fedfm.core.method import Client, Method, Paper
from fedfm.core.terms import Proximal
from fedfm.core.update import Tensors
from fedfm.errors import require
from fedfm.schedule.mixing import Mixing
from fedfm.schedule.staleness import Discount


@dataclass(frozen=True)
class FedAsync(Method):
    """Client: $\\min_v F_k(v) + \\frac{\\rho}{2} \\lVert v - w_t \\rVert^2$; server, at each arrival:
    $w \\leftarrow (1 - \\alpha s(u)) w + \\alpha s(u) w_k$.

    Args:
        rho: $\\rho$, strength of the pull towards the received weights; 0 is none.
        alpha: $\\alpha$, share of an upload without staleness, above 0 and at most 1.
        discount: $s(u)$ by its name: ``constant``, ``polynomial`` or ``hinge``.
        power: $c$ of $(1 + u)^{-c}$; the paper's $a$.
        slope: $a$ of the hinge $1 / (a (u - b) + 1)$.
        grace: $b$ of the hinge, in versions.
        concurrency: tasks in flight; 0 means as many as the sampler draws.
        max_staleness: uploads with more versions than this between start and arrival are dropped; -1 drops none.
        sigma: standard deviation of the logarithm of devices' speeds; ours.
    """

    paper: ClassVar[Paper | None] = Paper(
        title="Asynchronous Federated Optimization",
        authors="Xie, Koyejo, Gupta",
        year=2019,
        venue="arXiv",
        arxiv="1903.03934",
    )

    rho: float = 0.005
    alpha: float = 0.6
    discount: Discount = "polynomial"
    power: float = 0.5
    slope: float = 10.0
    grace: int = 4
    concurrency: int = 0
    max_staleness: int = -1
    sigma: float = 1.0

    def __post_init__(self) -> None:
        require(self, "rho", 0 <= self.rho < math.inf, "at least 0 and finite")
        self.parts()  # refuses wrong settings of the rule

    def terms(self, client: Client, message: Tensors) -> tuple[Term, ...]:
        """The pull, unless it is none."""
        return (Proximal(self.rho),) if self.rho else ()

    def parts(self) -> Mapping[str, Any]:
        """The mixing at each arrival."""
        schedule = Mixing(
            self.alpha,
            concurrency=self.concurrency,
            discount=self.discount,
            power=self.power,
            slope=self.slope,
            grace=self.grace,
            max_staleness=self.max_staleness,
            sigma=self.sigma,
        )
        return {"schedule": schedule}
