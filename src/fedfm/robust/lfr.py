"""LFR: Fang et al. 2020, Local Model Poisoning Attacks to Byzantine-Robust Federated Learning, USENIX Security 2020
(arXiv 1911.11815), the defence by the loss function.

An upload does harm if the model is better without it. The server tries this out for each upload on rows of its own and
leaves out those that harm the most.

Differences from the paper:
- The server's rows are the run's public rows.
- The paper's other two defences are left out: ERR removes by the error rate, which not every task has, and the union
  removes those of both; the paper finds LFR the better one of the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedfm.core.method import Paper
from fedfm.core.update import Update
from fedfm.robust.leaving_out import LeavingOut
from fedfm.robust.sight import Sight


@dataclass(frozen=True)
class LFR(LeavingOut):
    """Leave out the $f$ uploads $k$ with the largest $L(\\text{all}) - L(\\text{all but } k)$, where $L$ is the loss of
    the model that the round would make of these uploads.

    The base rule of the paper is the run's own: its mean or estimator, and what the method does with it. A round costs
    one evaluation on the public rows for each upload, and one more. Of equally harmful uploads, the first by client id
    is left out.
    """

    paper: ClassVar[Paper | None] = Paper(
        title="Local Model Poisoning Attacks to Byzantine-Robust Federated Learning",
        authors="Fang, Cao, Jia, Gong",
        year=2020,
        venue="USENIX Security",
        arxiv="1911.11815",
    )
    id: ClassVar[str] = "lfr"

    def worst(self, updates: Sequence[Update], sight: Sight) -> list[str]:
        whole = sight.loss(updates)
        harm = {u.member: whole - sight.loss([other for other in updates if other is not u]) for u in updates}
        return sorted(harm, key=lambda member: (-harm[member], member))[: self.hostile]
