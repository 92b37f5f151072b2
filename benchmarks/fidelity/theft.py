"""What a thief makes of a model that bears a mark, and whether it can be told afterwards whose it was."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import torch

from benchmarks.fidelity.claim import Score
from fedfm.core.client import View
from fedfm.core.jobs import Fit, Job
from fedfm.core.method import State
from fedfm.core.update import Member, Tensors
from fedfm.federation import Federation

TRIED = ("fine-tuned", "pruned 30 %")
"""What claims ask for."""


def stolen(run: Federation, models: Mapping[str, Tensors]) -> dict[str, Callable[[], dict[str, Tensors]]]:
    """What clients make of the models that they have, by what they do: each tunes with its own training rows."""

    def tuned(rate: float) -> dict[str, Tensors]:
        asked: list[tuple[Job, View]] = []
        for thief, weights in models.items():
            examples = run.plan.members.member(thief).examples
            epoch = -(-examples // run.plan.training.per_device_train_batch_size)
            job = Fit(weights, train=run.method.train, max_steps=5 * epoch, rate=rate, purpose="theft")
            asked.append((job, View(Member(thief, examples), 1, space=run.layout)))
        return dict(zip(models, (answer.tensors for answer in run.trainer.answers(asked)), strict=True))

    def cut(share: float) -> dict[str, Tensors]:
        return {thief: pruned(weights, share) for thief, weights in models.items()}

    return {
        "as it is": lambda: dict(models),
        "fine-tuned": lambda: tuned(1.0),
        "fine-tuned gently": lambda: tuned(0.1),
        "pruned 30 %": lambda: cut(0.3),
        "pruned 60 %": lambda: cut(0.6),
    }


def pruned(weights: Tensors, share: float) -> Tensors:
    """Each tensor without that share of its entries that are smallest in size."""
    return {n: torch.where(t.abs() >= t.abs().flatten().float().quantile(share), t, 0.0) for n, t in weights.items()}


def told(run: Federation, state: State) -> Score:
    """Each client steals what it has, tunes or prunes it. Of all that comes of it, by marks and nothing else:

    - ``told``: the share that is claimed by whom it belongs to: the owner; of copies, the client who had it; of
      clients' signatures, the share of clients.
    - ``traced``: the share of which the marks of the thief are found and no others'.
    """
    marking = run.marking
    assert marking
    copies = marking.copies(state)
    found: dict[str, list[float]] = {"told": [], "traced": []}
    models = {thief: copies.get(thief, state.weights) for thief in run.ids}
    made = stolen(run, models)
    for name in TRIED:
        for thief, tensors in made[name]().items():
            verdict = marking.verify({n: tensors[n] for n in models[thief]})
            claims = verdict.claims
            found["told"].append(float(thief in claims) if copies else len(claims) / len(verdict.rates))
            found["traced"].append(float(claims == [thief]))
    return {name: statistics.fmean(shares) for name, shares in found.items()}
