"""Scores of clients brought together: pooled, mean over clients, worst decile."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fedfm.core import trees
from fedfm.core.update import Update
from fedfm.errors import RecipeError
from fedfm.tasks.task import Task


@dataclass(frozen=True)
class Evaluation:
    """When clients are scored during training, and how many of them.

    Args:
        every: rounds between two evaluations; 0 means never.
        max_clients: clients scored; when there are more, the same random ones each time.
    """

    every: int = 1
    max_clients: int = 50

    def __post_init__(self) -> None:
        if self.every < 0 or self.max_clients < 1:
            raise RecipeError(
                "evaluation.every must be at least 0 and evaluation.max_clients at least 1, but they are "
                f"{self.every} and {self.max_clients}."
            )


@dataclass(frozen=True)
class Assessment:
    """Metrics of a set of clients.

    Args:
        pooled: over all their examples together.
        mean: mean over clients, each counting the same.
        worst_decile: mean of the loss over the tenth of the clients with the highest loss, at least one client.
        clients: metrics of each.
        examples: number of examples of each.
    """

    pooled: Mapping[str, float]
    mean: Mapping[str, float]
    worst_decile: float
    clients: Mapping[str, Mapping[str, float]]
    examples: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """Plain values; a number that is not finite becomes ``None``."""
        return {
            "global": plain(self.pooled),
            "mean": plain(self.mean),
            "worst_decile": self.worst_decile if math.isfinite(self.worst_decile) else None,
            "clients": {c: {**plain(m), "examples": self.examples[c]} for c, m in self.clients.items()},
        }


def plain(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Metrics with ``None`` for what is not finite, as JSON has no such numbers."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def _sound(update: Update) -> bool:
    """Whether a client has sums of examples that can be added to those of others."""
    counted = update.tensors.get("examples")
    known = counted is not None and counted.numel() == 1 and math.isfinite(float(counted.real))
    return known and 0 < update.weight < math.inf and not any(t.is_complex() for t in update.tensors.values())


def assess(task: Task, updates: Iterable[Update]) -> Assessment | None:
    """Bring the answers to ``validate`` or ``test`` together; ``None`` when nobody has an example in that split.

    Sums of other names and shapes than those of most clients are left out. A loss that is no number is not: a client
    whose model has diverged is to be seen.
    """
    tallies = {u.member: u.tensors for u in updates if _sound(u)}
    kinds = {name: tuple(sorted((n, t.shape) for n, t in tally.items())) for name, tally in tallies.items()}
    usual = max(counts, key=counts.__getitem__) if (counts := Counter(kinds.values())) else ()
    tallies = {name: tally for name, tally in tallies.items() if kinds[name] == usual}
    if not tallies:
        return None
    examples = {u: int(tally["examples"]) for u, tally in tallies.items()}
    clients = {name: task.metrics(tally) for name, tally in tallies.items()}
    names = next(iter(clients.values()))
    losses = sorted((m["loss"] for m in clients.values()), key=lambda x: math.inf if math.isnan(x) else x, reverse=True)
    worst = losses[: max(1, math.ceil(len(losses) / 10))]
    return Assessment(
        pooled=task.metrics(trees.total(tallies.values())),
        mean={n: sum(m[n] for m in clients.values()) / len(clients) for n in names},
        worst_decile=sum(worst) / len(worst),
        clients=clients,
        examples=examples,
    )
