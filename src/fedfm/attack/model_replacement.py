"""Model replacement: Bagdasaryan, Veit, Hua, Estrin, Shmatikov 2020, How To Backdoor Federated Learning, AISTATS 2020
(arXiv 1807.00459), constrain-and-scale.

A hostile client trains a backdoor in while staying near the model that it received, and enlarges its upload so that the
mean of the round becomes its model.

Differences from the paper:
- The learning rate and number of steps of hostile clients are those of the run, where the paper lowers the one and
  raises the other.
- The distance to the received model is added to the loss by $(1 - \\alpha) / \\alpha$, which scales the objective of
  the paper by $1 / \\alpha$; the paper leaves $\\alpha$ to the attacker.
- Several hostile clients of a round share the enlargement.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedfm.attack.badnets import BadNets
from fedfm.attack.threat import Hostile, Sight
from fedfm.attack.vectors import length
from fedfm.core import trees
from fedfm.core.jobs import Fit, Job
from fedfm.core.method import Paper
from fedfm.core.update import Tensors
from fedfm.errors import require


@dataclass(frozen=True)
class Near:
    """$c \\lVert w - w^0 \\rVert_2$ with the weights $w^0$ before the first step.

    Args:
        factor: $c$.
    """

    factor: float

    def __call__(self, weights: Tensors, start: Tensors) -> torch.Tensor:
        return self.factor * length({name: w - start[name] for name, w in weights.items()})


@dataclass(frozen=True, kw_only=True)
class ModelReplacement(BadNets):
    """$\\gamma (X - G)$ in place of the upload, where $X$ minimises
    $\\alpha L_{class} + (1 - \\alpha) \\lVert X - G \\rVert_2$ on rows with a trigger among the others.

    Args:
        alpha: $\\alpha$, above 0 and at most 1.
        factor: $\\gamma$; 0 means $n / f$, the clients of the round for each hostile one of them.
        max_norm: $S$: the upload is enlarged to this norm at most (train-and-scale); 0 means no bound.
    """

    paper: ClassVar[Paper | None] = Paper(
        title="How To Backdoor Federated Learning",
        authors="Bagdasaryan, Veit, Hua, Estrin, Shmatikov",
        year=2020,
        venue="AISTATS",
        arxiv="1807.00459",
    )
    id: ClassVar[str] = "model-replacement"

    share: float = 0.3125
    """20 of 64 rows of a batch, as in the paper."""
    alpha: float = 0.7
    factor: float = 0.0
    max_norm: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "alpha", 0 < self.alpha <= 1, "above 0 and at most 1")
        require(self, "factor", 0 <= self.factor < float("inf"), "at least 0 and finite")
        require(self, "max_norm", 0 <= self.max_norm < float("inf"), "at least 0 and finite")

    def job(self, job: Job, who: Hostile) -> Job:
        if not isinstance(job, Fit) or self.alpha == 1:
            return job
        return replace(job, terms=(*job.terms, Near((1 - self.alpha) / self.alpha)))

    def update(self, sight: Sight) -> Tensors:
        factor, norm = self.factor or sight.cohort / sight.hostile, trees.norm(sight.own.tensors)
        if self.max_norm and norm:
            factor = min(factor, self.max_norm / norm)
        return trees.scale(sight.own.tensors, factor)
