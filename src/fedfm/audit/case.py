"""A finished run as an auditor has it: the rows, the final model, and any round of it once more.

An auditor knows which rows were trained on; an attack does not. What a round gave away is not stored by runs: as every
draw of a run follows from its seed, the round is done again and looked at.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Any

import torch

from fedfm.audit.watch import Alter, Watched, watch
from fedfm.core import seeds
from fedfm.core.client import View
from fedfm.core.jobs import Job, Loss, Predict, Scores
from fedfm.core.plan import Members
from fedfm.core.update import Member, Tensors
from fedfm.errors import RecipeError
from fedfm.federation import Federation
from fedfm.rounds import Rounds
from fedfm.tasks.task import Example
from fedfm.train.trainer import Trainer

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Candidate:
    """A row of which an attack says whether it was trained on.

    Args:
        client: whose.
        split: in which.
        position: where in the split.
    """

    client: str
    split: str
    position: int

    @property
    def trained(self) -> bool:
        """The truth."""
        return self.split == "train"


@dataclass(frozen=True)
class Shadow:
    """The global model of a run on other rows.

    Args:
        tensors: of it.
        inside: of each candidate, whether it was trained on.
    """

    tensors: Tensors
    inside: torch.Tensor


def reader(federation: Federation) -> Trainer:
    """Answers jobs on any row of the clients, also on those that ``dp-sgd`` keeps from all others."""
    own = federation.judge
    members = federation.base_plan.members
    return Trainer(own.loaded, own.space, own.task, own.training, members, public=own.public, seed=own.seed)


@dataclass
class Case:
    """A run under audit.

    Args:
        federation: of the run.
        tensors: the global model after the last round; empty where there is none.
        rows: candidates on each side, at most.
        models: shadow models, for attacks that train some.
        round: whose uploads are looked at.
        seed: of the auditor's draws.
    """

    federation: Federation
    tensors: Tensors
    rows: int = 200
    models: int = 8
    round: int = 1
    seed: int = 0
    _watched: dict[int, Watched] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name, least in (("rows", 8), ("models", 2), ("round", 1)):
            if getattr(self, name) < least:
                raise RecipeError(f"an audit needs {name} of at least {least}, but got {getattr(self, name)}.")
        if self.round > (last := self.federation.plan.rounds):
            raise RecipeError(f"round {self.round} is to be audited, but the run has {last} rounds.")

    @property
    def members(self) -> Members:
        """The clients."""
        return self.federation.base_plan.members

    @cached_property
    def reader(self) -> Trainer:
        """Answers jobs on any row, as an auditor may look at all of them."""
        return reader(self.federation)

    @cached_property
    def candidates(self) -> list[Candidate]:
        """As many rows that were trained on as others, of clients in an order that is drawn, by client.

        A row that was not trained on, but is equal to one of these clients' that was, is nobody's secret and left out.

        Raises:
            RecipeError: there are fewer than four on a side.
        """
        ids = sorted(self.members.ids)
        sides: dict[bool, list[Candidate]] = {True: [], False: []}
        order = seeds.numpy_generator(self.seed, "audit", "clients").permutation(len(ids))
        known: set[str] = set()
        for client in (ids[int(at)] for at in order):
            for split in SPLITS:
                sides[split == "train"] += [
                    Candidate(client, split, position) for position in range(len(self.members.rows(client, split)))
                ]
            known.update(_text(row) for row in self.members.rows(client, "train"))
            if all(len(side) >= 4 * self.rows for side in sides.values()):
                break
        sides[False] = [c for c in sides[False] if _text(self.members.rows(c.client, c.split)[c.position]) not in known]
        draw = seeds.numpy_generator(self.seed, "audit", "rows")
        drawn = []
        for side in sides.values():
            order = draw.permutation(len(side))
            # A row of which a task makes no example was not trained on, whatever its split.
            usable = (side[int(at)] for at in order if self._example(side[int(at)]) is not None)
            drawn.append(list(islice(usable, self.rows)))
        most = min(map(len, drawn))
        if most < 4:
            raise RecipeError(
                f"an audit compares rows that were trained on with others, and there are {len(drawn[0])} and "
                f"{len(drawn[1])}. Hold some out: data.splits.test: 0.2."
            )
        chosen = [candidate for side in drawn for candidate in side[:most]]
        return sorted(chosen, key=lambda c: (c.client, SPLITS.index(c.split), c.position))

    def _example(self, candidate: Candidate) -> Example | None:
        """A row as the task encodes it; nothing if nothing of it can be learnt."""
        row = self.members.rows(candidate.client, candidate.split)[candidate.position]
        return next(iter(self.federation.task.encode([row], self.reader.loaded)), None)

    @cached_property
    def examples(self) -> list[Example]:
        """The candidates' rows as the task encodes them."""
        return [example for candidate in self.candidates if (example := self._example(candidate)) is not None]

    @cached_property
    def trained(self) -> torch.Tensor:
        """The truth: which candidates were trained on, ``[N]``."""
        return torch.tensor([candidate.trained for candidate in self.candidates])

    @cached_property
    def labels(self) -> torch.Tensor:
        """The class of each candidate, ``[N]``; for classification."""
        return torch.stack([example.target for example in self.examples])

    def ask(self, job: Callable[[str], Job], clients: Sequence[str] | None = None) -> list[Any]:
        """The answers to a job on the candidates' rows, client by client, in their order.

        Args:
            job: makes it for a split.
            clients: on the rows of these alone; of all unless given.
        """
        found = []
        for client in dict.fromkeys(c.client for c in self.candidates if clients is None or c.client in clients):
            pairs = zip(self.candidates, self.examples, strict=True)
            examples = [example for candidate, example in pairs if candidate.client == client]
            found.append(self._answer(job("train"), client, examples, self.federation.plan.rounds))
        return found

    def read(self, job: Job, rows: Sequence[Mapping[str, Any]]) -> Any:
        """The answer to a job on the split ``train`` of rows that an attacker made or has, in their order."""
        return self._answer(job, "auditor", self.federation.task.encode(rows, self.reader.loaded), 1)

    def _answer(self, job: Job, client: str, examples: list[Example], round: int) -> Any:
        view = View(Member(client, len(examples)), round, space=self.federation.layout)
        with self.reader.given(view, examples):
            return self.reader.answer(job, view)

    @property
    def initial(self) -> Tensors:
        """The global model before the first round."""
        return self.federation.result(self.federation.start())

    def losses(self, tensors: Tensors, clients: Sequence[str] | None = None) -> torch.Tensor:
        """The loss of each candidate with these tensors, in nats per supervised position, ``[N]``; or of those of some
        clients."""
        answers: list[Scores] = self.ask(lambda split: Loss(tensors, split=split), clients)
        return torch.cat([per_position(answer) for answer in answers])

    def logits(self, tensors: Tensors) -> torch.Tensor:
        """The class scores of each candidate, ``[N, K]``; for classification."""
        return torch.cat([answer.double().cpu() for answer in self.ask(lambda split: Predict(tensors, split=split))])

    @cached_property
    def shadows(self) -> list[Shadow]:
        """Runs like the audited one, with its protections, each with half of the candidates, drawn by coins, in place
        of those that were trained on. All other rows are the same: so the attacker knows everything but the candidates.
        """
        found = []
        for number in range(self.models):
            draw = seeds.generator(self.seed, "audit", "shadow", number)
            inside = torch.rand(len(self.candidates), generator=draw) < 0.5
            trained = [c for c, coin in zip(self.candidates, inside.tolist(), strict=True) if coin]
            # Another seed: a shadow knows neither the initial draws of clients' batches nor their noise.
            other = seeds.derive(self.seed, "audit", "shadow", number) % 2**31
            people = Redrawn(self.federation.members, tuple(self.candidates), tuple(trained))
            run = self.federation.on(people, seed=other, secret=other)
            found.append(Shadow(run.result(Rounds(run, None, ()).run(False).state), inside))
        return found

    @property
    def watched(self) -> Watched:
        """What the server saw in the audited round."""
        return self.seen(self.round)

    def seen(self, round: int, alter: Alter | None = None) -> Watched:
        """What the server saw in a round.

        Args:
            round: which one.
            alter: what it handed out in it, where that is not what it should; done again each time.
        """
        if alter is not None:
            return watch(self.federation, round, alter)
        if round not in self._watched:
            self._watched[round] = watch(self.federation, round)
        return self._watched[round]

    def bare(self) -> Case | None:
        """The same run without what protects clients' rows, trained here; ``None`` where nothing does."""
        given = self.federation.given
        stages = tuple(stage for stage in given["stages"] if not stage.guards)
        if given["privacy"] is None and given["secure"] is None and len(stages) == len(given["stages"]):
            return None
        run = self.federation.on(self.federation.members, privacy=None, secure=None, stages=stages)
        return replace(self, federation=run, tensors=run.result(Rounds(run, None, ()).run(False).state), _watched={})


def per_position(scores: Scores) -> torch.Tensor:
    """The losses of examples, in nats per supervised position, ``[N]``."""
    return (scores.loss.double() / scores.count.clamp_min(1)).cpu()


def _text(row: Mapping[str, Any]) -> str:
    """A row, so that equal ones are equal texts."""
    return json.dumps(row, sort_keys=True, default=repr)


@dataclass(frozen=True)
class Redrawn:
    """Members some of whose rows are trained on by other coins.

    Args:
        members: the members.
        candidates: the rows that had coins.
        inside: those that are trained on; the other ones are not.
    """

    members: Members
    candidates: Sequence[Candidate]
    inside: Sequence[Candidate]

    @property
    def ids(self) -> Sequence[str]:
        return self.members.ids

    def member(self, id: str) -> Member:
        """The member, with the number of its rows as it is now."""
        return replace(self.members.member(id), examples=len(self.rows(id, "train")))

    def rows(self, id: str, split: str) -> Sequence[Mapping[str, Any]]:
        """The rows of a split; those with coins come last in ``train``."""
        if split != "train":
            return self.members.rows(id, split)
        drawn = {c.position for c in self.candidates if c.client == id and c.trained}
        kept = [row for at, row in enumerate(self.members.rows(id, split)) if at not in drawn]
        return kept + [self.members.rows(id, c.split)[c.position] for c in self.inside if c.client == id]

    def pooled(self) -> Members:
        return self.members.pooled()
