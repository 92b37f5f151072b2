"""FedBuff: Nguyen et al. 2022, Federated Learning with Buffered Asynchronous Aggregation (arXiv 2106.06639).

FedAvg in which the server acts on every so many uploads instead of waiting for everyone, and discounts those that
started from an older model. With FedAsync it makes the two rules of the catalogue's row ``async-staleness``; the rule
itself is :class:`fedfm.schedule.buffered.Buffered`, which names how it differs from the paper.

Differences from the paper:
- The server rule is the run's, plain addition unless told otherwise; the paper also uses momentum on the server.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fedfm.core.method import Method, Paper
from fedfm.schedule.buffered import Buffered


@dataclass(frozen=True)
class FedBuff(Method):
    """$w \\leftarrow w + \\frac{1}{M} \\sum_{k \\in \\text{buffer}} (1 + u_k)^{-c} \\Delta_k$, clients being equal.

    Args:
        buffer: $M$, uploads for one server update; the paper's $K = 10$.
        concurrency: tasks in flight; 0 means as many as the sampler draws.
        power: $c$; the paper's is 1/2.
        max_staleness: uploads with more versions than this between start and arrival are dropped; -1 drops none.
        sigma: standard deviation of the logarithm of devices' speeds; ours.
    """

    paper: ClassVar[Paper | None] = Paper(
        title="Federated Learning with Buffered Asynchronous Aggregation",
        authors="Nguyen, Malik, Zhan, Yousefpour, Rabbat, Malek, Huba",
        year=2022,
        venue="AISTATS",
        arxiv="2106.06639",
    )

    buffer: int = 10
    concurrency: int = 0
    power: float = 0.5
    max_staleness: int = -1
    sigma: float = 1.0

    def __post_init__(self) -> None:
        self.parts()  # refuses wrong settings

    def parts(self) -> Mapping[str, Any]:
        """The buffer."""
        schedule = Buffered(
            self.buffer,
            concurrency=self.concurrency,
            power=self.power,
            max_staleness=self.max_staleness,
            sigma=self.sigma,
        )
        return {"schedule": schedule}
