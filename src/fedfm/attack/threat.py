"""The contract of a threat: what hostile clients, or a hostile foundation model, do to a federation.

A threat acts at four places of a round and says at each only what it changes:

=========== ================================= ==========================================================
place       hook                              what it changes
=========== ================================= ==========================================================
data        :meth:`Threat.rows`               the training rows of a hostile client
objective   :meth:`Threat.job`                what a hostile client trains, such as a term of its loss
update      :meth:`Threat.update`             what leaves a hostile client in place of its honest upload
dispatch    :meth:`Threat.public`,            the rows and the first weights that the server hands out
            :meth:`Threat.initial`
=========== ================================= ==========================================================

It declares what it knows, and is handed no more than that. It runs in simulation only, for measuring defences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from fedfm.core.jobs import Job
from fedfm.core.traits import Part
from fedfm.core.update import Kind, Tensors, Update
from fedfm.errors import require

Row = Mapping[str, Any]
Rows = Sequence[Row]

Knowledge = Literal["local", "colluding", "omniscient"]
"""What a hostile client looks at when it forges an upload: its own honest upload (``local``), those of all hostile
clients of the round (``colluding``), or those of the honest clients, too (``omniscient``)."""

Pretrain = Callable[[Tensors, int], Tensors]
"""Trains tensors for so many optimizer steps on the public rows."""


@dataclass
class Circle:
    """The hostile clients of a run, among themselves.

    Args:
        ids: their names, in the order of their ranks.
        told: what those who worked in this round already have told the others, by a name. They work one after the other
            in the order of their ranks, and each must go by what those before it said alone: a task may be begun again.
    """

    ids: tuple[str, ...] = ()
    told: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Hostile:
    """Who a hostile client is.

    Args:
        id: its name.
        rank: its place among the hostile clients of the run, from 0.
        count: how many hostile clients the run has.
        classes: how many the task has, $K$; 0 where it has none.
        draw: random numbers for this client.
        circle: the others, where it is asked for a job.
    """

    id: str
    rank: int
    count: int
    classes: int
    draw: torch.Generator
    circle: Circle = field(default_factory=Circle, compare=False)


@dataclass
class Sight:
    """What a hostile client knows when it forges its upload.

    Args:
        who: the client; its random numbers are those of this round.
        round: number of the round, from 1.
        own: what it would send if it were honest, after its own training.
        message: what it received.
        cohort: how many clients were asked in this round, $n$.
        hostile: how many of them are hostile, $f$.
        colluders: honest uploads of all hostile clients of the round, its own among them; empty unless the threat is
            colluding or omniscient.
        honest: uploads of the honest clients, as they leave them but not packed; empty unless it is omniscient.
        memory: what it kept in an earlier round; empty at first.
        kept: what ``keep`` was given.
    """

    who: Hostile
    round: int
    own: Update
    message: Tensors
    cohort: int
    hostile: int
    colluders: tuple[Update, ...] = ()
    honest: tuple[Update, ...] = ()
    memory: Tensors = field(default_factory=dict)
    kept: Tensors | None = None

    def keep(self, tensors: Tensors) -> None:
        """Remember tensors for a later round. Takes effect only when the forged upload is admitted."""
        self.kept = dict(tensors)


@dataclass(frozen=True, kw_only=True)
class Threat(Part):
    """Subclasses are frozen dataclasses and override the hooks that they need; one that overrides none does nothing.

    Whose upload is forged does not obey the stages of the recipe: its client skips clipping and noise, and packs its
    upload only because the server could not read it otherwise. What the server does with uploads, as its own clipping,
    holds for it. Clients whose data or loss alone are poisoned obey all stages.

    Args:
        clients: the share of the clients that is hostile, drawn by the run's seed (at least one unless it is 0); or
            their names.
        first: the first round in which they are hostile; before it they are honest.
        last: the last one; 0 means that there is no last one.
        every: rounds from one hostile round to the next.
    """

    id: ClassVar[str]
    """Its name in recipes."""
    tasks: ClassVar[tuple[str, ...]] = ()
    """Ids of the tasks whose rows it can poison; empty means any."""
    kinds: ClassVar[frozenset[Kind]] = frozenset({Kind.DELTA})
    """The kinds of upload that it can forge."""
    targeted: ClassVar[bool] = False
    """Whether there is an answer that it wants, so that its success can be measured by :meth:`probe`."""
    server: ClassVar[bool] = False
    """Whether what the server hands out is hostile, and no client is."""

    clients: float | tuple[str, ...] = 0.2
    first: int = 1
    last: int = 0
    every: int = 1

    def __post_init__(self) -> None:
        share = self.clients
        require(self, "clients", not isinstance(share, float | int) or 0 <= share <= 1, "a share from 0 to 1, or names")
        require(self, "first", self.first >= 1, "at least 1")
        require(self, "last", self.last == 0 or self.last >= self.first, "0, or at least first")
        require(self, "every", self.every >= 1, "at least 1")

    @property
    def knowledge(self) -> Knowledge:
        """What it looks at when it forges."""
        return "local"

    @property
    def forges(self) -> bool:
        """Whether it changes uploads."""
        return type(self).update is not Threat.update

    def active(self, round: int) -> bool:
        """Whether hostile clients are hostile in a round."""
        return round >= self.first and (not self.last or round <= self.last) and (round - self.first) % self.every == 0

    def rows(self, rows: Rows, who: Hostile) -> Rows:
        """The training rows of a hostile client, as many as it has (data)."""
        return rows

    def job(self, job: Job, who: Hostile) -> Job:
        """What a hostile client asks of its trainer instead of ``job`` (objective)."""
        return job

    def update(self, sight: Sight) -> Tensors:
        """What a hostile client sends instead of the tensors of its honest upload (update)."""
        return sight.own.tensors

    def public(self, rows: Rows, draw: torch.Generator) -> Rows:
        """The rows that the server and all clients have (dispatch)."""
        return rows

    def initial(self, tensors: Tensors, pretrain: Pretrain) -> Tensors:
        """The tuned tensors that the server hands out first (dispatch)."""
        return tensors

    def probe(self, rows: Rows) -> Rows:
        """Held-out rows as the attacker would change them, with the answer that it wants; of a targeted threat."""
        return []

    def trial(self, job: Job, circle: Circle) -> Job:
        """What is asked of a client's model to see whether the attack succeeds, instead of ``job``, which scores it on
        the rows of :meth:`probe`. Nobody has told anything when the first client of a round of scores is asked."""
        return job
