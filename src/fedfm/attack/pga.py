"""PGA: Shejwalkar, Houmansadr, Kairouz, Ramage 2022, Back to the Drawing Board: A Critical Evaluation of Poisoning
Attacks on Production Federated Learning, IEEE S&P 2022 (arXiv 2108.10241), model poisoning by projected gradient
ascent.

A hostile client climbs where honest ones descend, and goes no further than they do: its upload makes the model worse
and is as long as any other. In the space ``prompt`` it is a prompt that spoils everybody's answers.

Differences from the paper:
- The radius is the length of what this client would have learnt honestly, times ``factor``; the paper takes the mean
  length of several hostile clients' honest uploads, and tries out which factor does most harm to the server's rule.
- Each step goes along the whole gradient of the client's rows, by the same length. The paper's are stochastic, by the
  run's optimizer; the loss of a model that is bad enough is so steep that such steps leave the ball at once.
- It climbs the task's loss, without what a method adds to it for honest clients.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from fedfm.attack.threat import Hostile, Threat
from fedfm.core import trees
from fedfm.core.jobs import Fit, Fitted, Gradient, Job
from fedfm.core.method import Client, Paper
from fedfm.core.traits import Trait, Traits
from fedfm.core.update import Tensors
from fedfm.errors import require

if TYPE_CHECKING:
    from fedfm.train.trainer import Trainer


@dataclass(frozen=True)
class Ascend(Job):
    """Climb instead of descending.

    Args:
        fit: the honest training.
        factor: how many times as far as that.
    """

    fit: Fit
    factor: float

    def run(self, trainer: Trainer, client: Client) -> Fitted:
        """As many steps as the honest training takes, each the share $2 / \\text{steps}$ of the radius long."""
        fit = self.fit
        honest: Fitted = trainer.answer(fit, client)
        start = trees.select({n: fit.tensors.get(n, t) for n, t in client.space.initial.items()}, fit.train)
        radius = self.factor * trees.norm(trees.subtract({n: honest.tensors[n] for n in start}, start))
        change = trees.scale(start, 0.0)
        for _ in range(honest.steps):
            at = {**fit.tensors, **trees.add(start, change)}
            asked = Gradient(at, train=fit.train, split=fit.split, patches=fit.patches, blocks=fit.blocks)
            slope = masked(trainer.answer(asked, client).tensors, fit.masks or {})
            if steep := trees.norm(slope):
                change = trees.add(change, trees.scale(slope, 2 * radius / honest.steps / steep))
            change = trees.scale(change, min(1.0, radius / (trees.norm(change) or 1.0)))
        return replace(honest, tensors={**honest.tensors, **trees.add(start, change)})


def masked(tensors: Tensors, masks: Tensors) -> Tensors:
    """Zero where a mask says that an entry may not change."""
    return {name: tensor * masks[name] if name in masks else tensor for name, tensor in tensors.items()}


@dataclass(frozen=True, kw_only=True)
class PGA(Threat):
    """$x \\leftarrow \\Pi_r \\left(x + \\eta \\nabla L / \\lVert \\nabla L \\rVert \\right)$ on the rows of a hostile
    client, with $\\Pi_r$ onto the ball of radius $r$ around the received weights.

    Args:
        factor: $r$ as a multiple of the length of the client's honest change; 1 hides among honest uploads.
    """

    paper: ClassVar[Paper | None] = Paper(
        title="Back to the Drawing Board: A Critical Evaluation of Poisoning Attacks on Production Federated Learning",
        authors="Shejwalkar, Houmansadr, Kairouz, Ramage",
        year=2022,
        venue="IEEE S&P",
        arxiv="2108.10241",
    )
    id: ClassVar[str] = "pga"
    needs: ClassVar[Traits] = frozenset({Trait.ONE_FIT})

    factor: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "factor", 0 < self.factor < float("inf"), "above 0 and finite")

    def job(self, job: Job, who: Hostile) -> Job:
        return Ascend({}, job, self.factor) if isinstance(job, Fit) and job.split == "train" else job
