"""GTG-Shapley: Liu et al. 2022, GTG-Shapley: Efficient and Accurate Participant Contribution Evaluation in Federated
Learning, ACM TIST (arXiv 2109.02053).

What a coalition of clients is worth is how good the model would be that their uploads alone had made of the round's
start; nobody trains anew. Shapley values of this game are estimated from random orders of the clients, with few models
scored: none where the round changed little, and of an order only as many as it takes to come close to the whole round.

Values are those of one round. A client's contribution to a run is the sum over its rounds.

Differences from the paper:
- The worth of a model is minus its mean loss on the server's public rows, in nats; the paper takes the accuracy, which
  not every task has.
- Orders come in groups in which each client leads once, and convergence is looked at after each group.
- Sampling ends after ``max_orders`` if it has not converged, so that a noisy game cannot hold up a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np

from fedfm.core import seeds
from fedfm.core.jobs import Loss
from fedfm.core.method import Method, Paper, Server, State
from fedfm.core.traits import Trait, Traits
from fedfm.core.update import Update
from fedfm.errors import RecipeError
from fedfm.value.audit import Audit
from fedfm.value.shapley import Worth, marginals, mean


@dataclass(frozen=True)
class GTGShapley(Audit):
    """$\\phi_i = \\frac{1}{|\\Pi|} \\sum_{\\pi \\in \\Pi} v(S_{\\pi,i} \\cup i) - v(S_{\\pi,i})$ over sampled orders
    $\\pi$, where $S_{\\pi,i}$ are those before $i$.

    Args:
        round_truncation: $\\epsilon_b$ in nats; when the whole round changed the worth by no more, all values are 0.
        order_truncation: $\\epsilon_i$ in nats; an order ends where less is left to the worth of the whole round.
        window: orders over which the estimate must have stayed the same.
        tolerance: mean over clients of the relative difference that still counts as the same.
        min_orders: orders sampled at least; never fewer than there are clients.
        max_orders: orders sampled at most, up to a group in which each client leads once.
    """

    paper: ClassVar[Paper | None] = Paper(
        title="GTG-Shapley: Efficient and Accurate Participant Contribution Evaluation in Federated Learning",
        authors="Liu, Chen, Yu, Liu, Cui",
        year=2022,
        venue="ACM TIST",
        arxiv="2109.02053",
    )
    id: ClassVar[str] = "gtg-shapley"
    needs: ClassVar[Traits] = Audit.needs | {Trait.GLOBAL}

    round_truncation: float = 0.001
    order_truncation: float = 0.001
    window: int = 10
    tolerance: float = 0.05
    min_orders: int = 30
    max_orders: int = 1000

    def __post_init__(self) -> None:
        for name in ("round_truncation", "order_truncation", "tolerance"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise RecipeError(f"GTGShapley {name} must be at least 0 and finite, but is {getattr(self, name)}.")
        if self.window < 1:
            raise RecipeError(f"GTGShapley window must be at least 1 order, but is {self.window}.")
        if not 1 <= self.min_orders <= self.max_orders:
            raise RecipeError(
                "GTGShapley min_orders must be at least 1 and at most max_orders, but they are "
                f"{self.min_orders} and {self.max_orders}."
            )

    def look(self, server: Server, method: Method, before: State, updates: Sequence[Update]) -> Mapping[str, float]:
        """The value of each client whose upload was admitted."""
        uploads = {update.member: update for update in sorted(updates, key=lambda update: update.member)}

        def worth(coalition: frozenset[str]) -> float:
            some = [upload for member, upload in uploads.items() if member in coalition]
            state = method.apply(before, method.combine(before, some, server.mean), server.rule) if some else before
            scores = server.do(Loss(method.result(state, server.space), split="public"))
            return -float(scores.loss.double().sum() / scores.count.sum())

        draw = seeds.numpy_generator(server.space.seed, server.round, self.id)
        return self.values(list(uploads), worth, draw)

    def values(self, players: Sequence[str], worth: Worth, draw: np.random.Generator) -> dict[str, float]:
        """Estimated Shapley values of a game.

        Args:
            players: who plays.
            worth: asked once for each coalition that is met.
            draw: source of the orders.
        """
        once = cache(worth)
        everyone = frozenset(players)
        if not players or abs(once(everyone) - once(frozenset())) <= self.round_truncation:
            return dict.fromkeys(players, 0.0)
        found: list[Mapping[str, float]] = []
        groups = guided(players, draw)
        while not self.settled(found, len(players)):
            found += [marginals(order, once, once(everyone), self.order_truncation) for order in next(groups)]
        return mean(found)

    def settled(self, found: Sequence[Mapping[str, float]], players: int) -> bool:
        """Whether the running mean of ``found`` has stayed the same for long enough, or time is up."""
        if len(found) <= max(self.min_orders, players, self.window):
            return False
        if len(found) >= self.max_orders:
            return True
        added = np.array(
            [list(one.values()) for one in ({k: f[k] for k in found[0]} for f in found)]
        )  # [orders, players]
        running = added.cumsum(0) / np.arange(1, len(added) + 1)[:, None]
        errors = np.abs(running[-self.window :] - running[-1]) / (np.abs(running[-1]) + 1e-12)
        return bool(errors.mean(1).max() <= self.tolerance)


def guided(players: Sequence[str], draw: np.random.Generator) -> Iterator[list[list[str]]]:
    """Group after group of orders, without end: in each group, each player leads once and the others come at random."""
    while True:
        yield [[one, *draw.permutation([p for p in players if p != one]).tolist()] for one in players]
