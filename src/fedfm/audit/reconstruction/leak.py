"""What a server holds of a client's round: a change of weights, and the work that it knows led to it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import torch

from fedfm.audit.case import Case
from fedfm.audit.watch import Exposed, Watched
from fedfm.core import seeds
from fedfm.core.client import View
from fedfm.core.jobs import Fit
from fedfm.core.traits import Trait
from fedfm.federation import Federation
from fedfm.privacy import dp_sgd
from fedfm.tasks.task import Example
from fedfm.train.batches import batches


@dataclass(frozen=True)
class Work:
    """The local steps of a client.

    Args:
        client: whose.
        share: its weight in the mean, where that is all the server reads.
        steps: for each step the rows of its batch, as positions in :attr:`Leak.rows`.
    """

    client: str
    share: float
    steps: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Leak:
    """A change of weights, with the steps behind it.

    A server knows the recipe, so the optimizer and the number of steps, the number of rows in each, and which of them
    came twice, as all draws of batches follow from the seed. With DP-SGD batches are drawn by a secret; an attack is
    told their sizes even so, as the papers have it. The rows' own content is the truth that it is scored by, and no
    more than their lengths may be looked at before.

    Args:
        exposed: the change.
        works: of those whose mean it is.
        rows: what they trained on in this round.
        places: of each row, whose it is and where in the split ``train``.
        rate: $\\eta$, the learning rate of the round.
    """

    exposed: Exposed
    works: tuple[Work, ...]
    rows: tuple[Example, ...]
    places: tuple[tuple[str, int], ...]
    rate: float

    @property
    def steps(self) -> int:
        """The most local steps of a client."""
        return max(len(work.steps) for work in self.works)

    def weights(self) -> torch.Tensor:
        """How much each row counts in the mean of all batch losses, ``[B]``; they add up to 1."""
        found = torch.zeros(len(self.rows))
        total = sum(work.share for work in self.works)
        for work in self.works:
            for step in work.steps:
                found[list(step)] += work.share / total / len(work.steps) / len(step)
        return found


def leaks(case: Case, most: int, watched: Watched | None = None) -> list[Leak]:
    """The changes that the server reads, at most so many; those without a row behind them not.

    Args:
        case: the run.
        most: how many.
        watched: what was seen of the audited round; as it is unless given.
    """
    seen, found = watched or case.watched, []
    run = seen.federation
    for exposed in seen.exposed():
        rows: list[Example] = []
        places: list[tuple[str, int]] = []
        works = []
        for client in exposed.clients:
            examples = run.trainer.encoded(client, "train")
            steps = [step for step in _steps(run, client, case.round, examples) if step]
            used = sorted({at for step in steps for at in step})
            where = {at: len(rows) + i for i, at in enumerate(used)}
            rows += [examples[at] for at in used]
            places += [(client, at) for at in used]
            equal = any(Trait.UNIFORM in stage.gives for stage in run.stages)
            share = 1.0 if equal else run.plan.members.member(client).examples
            if steps:
                works.append(Work(client, share, tuple(tuple(where[at] for at in step) for step in steps)))
        if works and exposed.change:
            rate = run.trainer.learning_rate(case.round)
            found.append(Leak(exposed, tuple(works), tuple(rows), tuple(places), rate))
    return found[:most]


def _steps(run: Federation, client: str, round: int, examples: list[Example]) -> list[list[int]]:
    """The batches of a client's training of the run's length, as positions in its examples."""
    trainer, member = run.trainer, run.plan.members.member(client)
    args, names = trainer.training, (round, client, "fit")
    if run.privacy:
        draw = seeds.generator(run.secret, *names, "examples")
        share = dp_sgd.rate(args, member.examples)
        return [
            (torch.rand(len(examples), generator=draw) < share).nonzero()[:, 0].tolist()
            for _ in range(dp_sgd.steps(args, member))
        ]
    count = trainer.steps(Fit({}), View(member, round), len(examples))
    order = batches(
        [len(example) for example in examples],
        args.per_device_train_batch_size,
        seeds.generator(run.seed, *names, "batches"),
        args.group_by_length,
    )
    return [[at for part in islice(order, args.gradient_accumulation_steps) for at in part] for _ in range(count)]
