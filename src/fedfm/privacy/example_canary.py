"""What DP-SGD in a client is worth at most, found by trying: an audit with examples as canaries, in one run.

Steinke, Nasr, Jagielski 2023, Privacy Auditing with One (1) Training Run, NeurIPS 2023 (arXiv 2305.08846).

One client has canaries for examples. A coin of its own says whether a canary is loud: then its gradient is as large as
it likes in one coordinate, which no other has; else it is zero, as if the example were not there. All goes the way of
any other example: batches drawn at random, the clipping of each, the noise, the optimizer, the rounds. From the final
weights one guesses the coins, of the canaries of which one is most sure. Guesses that are too good for the epsilon that
is claimed mean that noise, clipping or the drawing of batches is not what the account believes. A bound below the claim
proves nothing, but that this attack fails.

Differences from the paper:
- A canary changes a gradient (the paper's strongest attack), and the model is not asked: so the audit is about what is
  done with gradients of single examples. That they are those of single examples is seen to at the first step of each
  training, see :mod:`fedfm.train.private`.
- How many guesses are made is chosen on half of the canaries, and the bound is that of the other half.
- The attacker sees the weights after all rounds, not those between.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.stats import binom

from fedfm.core import seeds, trees
from fedfm.core.jobs import Fit, Job
from fedfm.core.method import Client
from fedfm.core.plan import Members
from fedfm.core.update import Member
from fedfm.errors import FedfmError, RecipeError
from fedfm.evaluate import Evaluation
from fedfm.federation import Federation
from fedfm.privacy.canary import LOUD, Finding
from fedfm.tasks.task import Batch, Example
from fedfm.train.trainer import Trainer

SURE = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
"""Shares of the canaries that may be guessed to be loud, and as many to be silent; the others are not guessed at."""


def audit(federation: Federation, canaries: int = 1000, confidence: float = 0.95) -> Finding:
    """Train one client that has canaries for examples, as the federation's clients are trained, and see what its
    weights tell of them.

    Args:
        federation: whose method, training arguments, rounds and ``privacy``; stages and all that the server does beside
            the method are left out, as this is about what leaves a client.
        canaries: how many examples the client has; at most the number of scalars that are trained and shared.
        confidence: of the bound.

    Returns:
        What was found. The claim is that of a client with so many examples.

    Raises:
        RecipeError: no noise on gradients is claimed, or there are more canaries than scalars.
    """
    initial, method = federation.layout.initial, federation.method
    seen = trees.select(trees.select(initial, method.train), method.share)
    if not 8 <= canaries <= trees.count(seen):
        raise RecipeError(
            f"canaries must be at least 8 and at most the {trees.count(seen)} scalars that are trained and shared, of "
            f"which each has one; there are {canaries}."
        )
    nest = Nest(canaries, federation.seed, tuple(sorted(seen)))
    run = Federation(
        federation.bench,
        method,
        nest,
        federation.task,
        space=federation.space,
        training=federation.base_plan.training,
        rounds=federation.base_plan.rounds,
        evaluation=Evaluation(every=0),
        seed=federation.seed,
        secret=federation.secret,
        privacy=federation.given["privacy"],
        engine=Crafted,
    )
    if "examples" not in (claim := run.spent(run.plan.rounds)):
        raise RecipeError("an audit of examples needs noise on their gradients. Set privacy to dp-sgd.")
    before, after = run.start().weights, run.run().state.weights
    change = torch.cat([(after[n] - before[n]).double().flatten().cpu() for n in nest.names])
    delta = claim["examples"]["delta"]
    wrong, bound = judge(change[:canaries].tolist(), nest.loud, delta, confidence)
    return Finding(claim["examples"]["epsilon"], delta, bound, confidence, *wrong)


def judge(
    scores: Sequence[float], loud: Sequence[bool], delta: float, confidence: float
) -> tuple[tuple[float, float], float]:
    """Which shares of the guesses "loud" and "silent" were wrong, and the epsilon that there is at least.

    Args:
        scores: of the canaries; that of a loud one is larger.
        loud: what their coins said.
        delta: $\\delta$.
        confidence: that the bound is no more than the true epsilon.
    """
    pairs = list(zip(scores, loud, strict=True))
    chosen, tried = pairs[::2], pairs[1::2]

    def guessed(share: float, among: Sequence[tuple[float, bool]]) -> tuple[tuple[float, float], float]:
        order = [said for _, said in sorted(among, key=lambda pair: pair[0])]
        count = max(1, math.floor(share * len(order)))
        alarms, missed = count - sum(order[-count:]), sum(order[:count])
        least = at_least(len(among), 2 * count, 2 * count - alarms - missed, delta, confidence)
        return (alarms / count, missed / count), least

    return guessed(max(SURE, key=lambda share: guessed(share, chosen)[1]), tried)


def at_least(canaries: int, guesses: int, right: int, delta: float, confidence: float) -> float:
    """The largest $\\varepsilon$ for which so many right guesses are too many; 0 if there is none.

    Args:
        canaries: $m$, that could have been guessed at.
        guesses: $r$, that were made.
        right: $v$ of them.
        delta: $\\delta$.
        confidence: one minus the probability of so many where $\\varepsilon$ is enough.
    """

    def excess(epsilon: float) -> float:
        return chance(canaries, guesses, right, epsilon, delta) - (1 - confidence)

    if excess(0.0) >= 0:
        return 0.0
    most = 1.0
    while excess(most) < 0:
        most *= 2
    return float(brentq(excess, 0.0, most, xtol=1e-6))


def chance(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """The most likely that $v$ or more of $r$ guesses are right, whatever the attack: Theorem 5.2 of the paper,

    $$\\beta + 2 m \\delta \\max_{1 \\le i \\le v} \\frac{P[v > W \\ge v - i]}{i}, \\quad \\beta = P[W \\ge v], \\quad
    W \\sim \\mathrm{Bin}\\left(r, \\frac{e^\\varepsilon}{1 + e^\\varepsilon}\\right).$$
    """
    one = 1 / (1 + math.exp(-epsilon))
    below = np.cumsum(binom.pmf(np.arange(right)[::-1], guesses, one)) / np.arange(1, right + 1)
    return float(binom.sf(right - 1, guesses, one) + 2 * canaries * delta * below.max(initial=0.0))


@dataclass(frozen=True)
class Nest:
    """One client, whose examples are canaries.

    Args:
        count: how many.
        seed: of their coins.
        names: of the tensors whose scalars they have, in this order.
    """

    count: int
    seed: int
    names: tuple[str, ...]

    @property
    def ids(self) -> list[str]:
        return ["nest"]

    @property
    def loud(self) -> list[bool]:
        """What the canaries' coins say."""
        return [bool(seeds.derive(self.seed, "canary", number) & 1) for number in range(self.count)]

    def member(self, id: str) -> Member:
        return Member(id, self.count)

    def rows(self, id: str, split: str) -> Sequence[Mapping[str, Any]]:
        return ()

    def pooled(self) -> Members:
        return self


class _Alone:
    """In the place of a task: gradients of single examples are computed one by one."""

    rowwise = False


class Crafted(Trainer):
    """Trains as any other, on examples whose gradients are the canaries'."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        nest: Any = self.data
        self.nest: Nest = nest
        self.task = _Alone()  # type: ignore[assignment]

    def encoded(self, client: str, split: str) -> list[Example]:
        return [Example(torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long))] * self.nest.count

    def answer(self, job: Job, client: Client) -> Any:
        if not isinstance(job, Fit):
            raise FedfmError(f"an audit by canaries is for clients that train, but this one asks for {job!r:.60}")
        pull = torch.tensor(self.nest.loud, device=self.device) * LOUD

        def criterion(weights: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
            return -pull[places] * weights[places]

        return super().answer(replace(job, criterion=criterion), client)

    def logits(self, examples: list[Example], batch: Batch, draws: Any = None) -> torch.Tensor:
        """The trained weights, in the order in which canaries have them."""
        return torch.cat([self.space.parameters[name].flatten() for name in self.nest.names])
