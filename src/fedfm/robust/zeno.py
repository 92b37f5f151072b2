"""Zeno: Xie, Koyejo, Gupta 2019, Zeno: Distributed Stochastic Gradient Descent with Suspicion-based Fault-tolerance,
ICML 2019 (arXiv 1805.10032).

Each upload is tried out alone on rows of the server: how far it brings the loss down, less a fine for its length. The
best are averaged. Hostile clients may be the majority, as uploads are not compared with each other.

Differences from the paper:
- The paper's workers send gradients $u$ and the step is $-\\gamma u$; here the upload is the step itself, and its own
  length is fined: the paper's $\\rho = \\gamma / 200$ at $\\gamma = 0.1$ becomes $\\rho / \\gamma^2 = 0.05$.
- The paper draws a few rows anew for each step; here all public rows are looked at, which costs more and varies less.
- What is kept goes on with its weight, so the mean is weighted by examples unless a stage such as Clip makes weights
  equal; the paper's is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedfm.core import trees
from fedfm.core.method import Paper
from fedfm.core.update import Kind, Update
from fedfm.errors import require
from fedfm.robust.leaving_out import LeavingOut
from fedfm.robust.sight import Sight


@dataclass(frozen=True)
class Zeno(LeavingOut):
    """Keep the $n - b$ uploads with the highest $f(x) - f(x + \\Delta_k) - \\rho \\lVert \\Delta_k \\rVert^2$, where
    $f$ is the loss on the server's rows.

    A round costs one evaluation on the public rows for each upload, and one more. Of equally good uploads, the first by
    client id is kept.

    Args:
        hostile: $b$, how many uploads are left out of each round.
        fine: $\\rho$, in nats by squared norm of an upload.
    """

    paper: ClassVar[Paper | None] = Paper(
        title="Zeno: Distributed Stochastic Gradient Descent with Suspicion-based Fault-tolerance",
        authors="Xie, Koyejo, Gupta",
        year=2019,
        venue="ICML",
        arxiv="1805.10032",
    )
    id: ClassVar[str] = "zeno"
    kinds: ClassVar[frozenset[Kind]] = frozenset({Kind.DELTA})

    fine: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "fine", 0 <= self.fine < float("inf"), "at least 0 and finite")

    def worst(self, updates: Sequence[Update], sight: Sight) -> list[str]:
        found = self.scores(updates, sight)
        return sorted(found, key=lambda member: (-found[member], member))[-self.hostile :]

    def scores(self, updates: Sequence[Update], sight: Sight) -> dict[str, float]:
        """The score of each upload, by client id."""
        before = sight.loss([])
        return {u.member: before - sight.loss([u]) - self.fine * trees.norm(u.tensors) ** 2 for u in updates}
