"""The contract of a watermark: who works on the model so that it can be told later whose it is, and how it is told.

A watermark states only what it changes of a run:

=============== ============================================ =====================================================
place           hook                                         what it changes
=============== ============================================ =====================================================
server          :meth:`Watermark.embed`                      the weights, before training and after each aggregation
message         :meth:`Watermark.dispatch`                   what each client receives
client          :meth:`Watermark.job`                        what a client trains, such as a term of its loss
=============== ============================================ =====================================================

What it looks for stands in a key, which is drawn before training. :meth:`Watermark.verify` needs the key alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from fedfm.core.jobs import Fit, Term
from fedfm.core.method import Client, Method, Paper
from fedfm.core.space import Layout
from fedfm.core.traits import Part, Trait, Traits
from fedfm.core.update import Tensors
from fedfm.errors import Incompatible, require
from fedfm.ownership import chance
from fedfm.schedule.schedule import Schedule
from fedfm.schedule.synchronous import Synchronous

if TYPE_CHECKING:
    import torch

    from fedfm.models import Loaded
    from fedfm.ownership.key import Key
    from fedfm.tasks.task import Task

OWNER = "owner"
"""Whose the only marks of a key are, where clients have none of their own."""

Draws = Callable[[str], np.random.Generator]
"""The secret: random numbers by the name of whose marks they are for."""


@dataclass(frozen=True)
class About:
    """What a key is drawn for.

    Args:
        task: what the model does.
        loaded: the model before training.
        classes: of the task; 0 where it has none.
        clients: names of all clients, sorted.
        layout: the tuned tensors.
        train: names of those that are trained and travel.
    """

    task: Task
    loaded: Loaded
    classes: int
    clients: Sequence[str]
    layout: Layout
    train: Sequence[str]


class Owner(Protocol):
    """The server, as far as it works on its own model. No client's row is in reach."""

    @property
    def round(self) -> int:
        """Number of the round; 0 before training."""
        ...

    @property
    def last(self) -> bool:
        """Whether no round comes after this one."""
        ...

    def taught(
        self,
        models: Mapping[str, Tensors],
        rate: float,
        *,
        terms: Sequence[Term] = (),
        public: bool = False,
        purpose: str = "",
    ) -> dict[str, Tensors]:
        """Models after a pass over marks, by whose marks they learn.

        Args:
            models: by a name in the key.
            rate: factor on the run's learning rate.
            terms: added to the loss.
            public: learn the public rows, too, if there are any.
            purpose: names the random draws.
        """
        ...

    def known(self, models: Mapping[str, Tensors]) -> dict[str, float]:
        """Share of the marks that each model answers as the key says with a probability above one half."""
        ...


class Suspect(Protocol):
    """A model of which is asked whose it is."""

    def right(self, rows: Sequence[Mapping[str, Any]]) -> torch.Tensor:
        """Which marks it answers as they say, ``[N]``."""
        ...

    def change(self, module: str) -> torch.Tensor:
        """How far its weight of a linear module is from that of the model before training, ``[out, in]``."""
        ...


@dataclass(frozen=True)
class Verdict:
    """What a key says of a model.

    Args:
        marks: independent trials of each set of marks, $n$.
        matches: of the set that matches most, $m$.
        threshold: matches from which on the model is claimed.
        p_value: probability of so many matches in the best of all sets, of a model made without the key (at most).
        false_positive: probability that such a model is claimed, at most.
        who: whose set that is.
        rates: share of matches of each set, by whose it is.
    """

    marks: int
    matches: int
    threshold: int
    p_value: float
    false_positive: float
    who: str = OWNER
    rates: Mapping[str, float] = field(default_factory=dict)

    @property
    def verified(self) -> bool:
        """Whether the model is claimed."""
        return self.matches >= self.threshold

    @property
    def claims(self) -> list[str]:
        """Whose sets match enough."""
        return sorted(name for name, rate in self.rates.items() if round(rate * self.marks) >= self.threshold)

    @property
    def runner_up(self) -> str:
        """Whose set matches second best; empty where there is but one."""
        others = sorted(self.rates, key=lambda name: (-self.rates[name], name))
        return next((name for name in others if name != self.who), "")

    @property
    def gap(self) -> float:
        """By how much the best set's share of matches is above that of the next."""
        return self.rates[self.who] - self.rates[self.runner_up] if self.runner_up else 0.0

    def says(self) -> str:
        """The same in words."""
        found = f"{self.matches} of {self.marks} marks match, {self.threshold} are needed (p = {self.p_value:.2g})"
        if self.runner_up:
            found = f"{self.who}: {found}; next is {self.runner_up} with {100 * self.rates[self.runner_up]:.0f} %"
        if not self.verified:
            return f"no mark found: {found}"
        if len(self.claims) > 1:
            return f"carries the marks of {len(self.claims)} of {len(self.rates)}; the best, {found}"
        return f"carries the mark{' of ' if self.runner_up else ': '}{found}"

    def to_json(self) -> dict[str, Any]:
        """The same for a record."""
        return {
            "verified": self.verified,
            "marks": self.marks,
            "matches": self.matches,
            "threshold": self.threshold,
            "p_value": self.p_value,
            "false_positive": self.false_positive,
            "who": self.who,
            "rates": dict(self.rates),
            "claimed_by": self.claims,
            **({"runner_up": self.runner_up, "gap": self.gap} if self.runner_up else {}),
            "says": self.says(),
        }


@dataclass(frozen=True, kw_only=True)
class Watermark(Part, ABC):
    """Subclasses are frozen dataclasses.

    Args:
        false_positive: the probability, at most, with which a model that was made without the key is claimed.
        secret: a file of 16 bytes or more from which the key is drawn, made when absent. Without one it is drawn from
            the run's secret, which in simulation is the seed of the recipe: who has the recipe could draw it again.
    """

    id: ClassVar[str]
    """Its name in recipes."""
    paper: ClassVar[Paper | None] = None
    needs: ClassVar[Traits] = frozenset({Trait.GLOBAL, Trait.RULED, Trait.ONE_ASK})
    instead: ClassVar[Mapping[Trait, str]] = {
        Trait.GLOBAL: "Only a model that all share can be marked: choose a method with one, such as fedavg or fedit.",
        Trait.RULED: "The server must be free to change the weights between rounds: choose a method such as fedavg.",
        Trait.ONE_ASK: "What is sent within a round would bear no mark: choose a method with one question a round.",
    }
    tasks: ClassVar[tuple[str, ...]] = ()
    """Ids of the tasks in whose models it can be; empty means any."""
    spaces: ClassVar[tuple[str, ...]] = ()
    """Ids of the spaces in which it can be; empty means any."""

    false_positive: float = 2.0**-64
    secret: str = ""

    def __post_init__(self) -> None:
        require(self, "false_positive", 0 < self.false_positive < 1, "above 0 and below 1")

    @property
    def in_clients(self) -> bool:
        """Whether clients take part in it."""
        return type(self).job is not Watermark.job

    @property
    def in_messages(self) -> bool:
        """Whether clients receive different models."""
        return type(self).dispatch is not Watermark.dispatch

    def fits(self, method: Method, schedule: Schedule | None) -> None:
        """See, before the run, that it can mark what this method makes.

        Raises:
            Incompatible: it cannot, for a reason of which traits say nothing.
        """
        me, who = type(self).__name__, type(method).__name__
        if type(method).result is not Method.result:
            raise Incompatible(
                f"{me} marks the weights that the server sends out, but {who} makes its model of something else. "
                "Choose a method such as fedavg or fedit."
            )
        if type(method).round is not Method.round:
            raise Incompatible(
                f"{me} marks the weights that the server sends out, but {who} has rounds of its own and may send "
                "something else. Choose a method such as fedavg or fedit."
            )
        if self.in_messages and type(method).message is not Method.message:
            raise Incompatible(
                f"{me} marks a copy of the weights for each client, but {who} sends clients something else. Choose a "
                "method such as fedavg or fedit, or the watermark waffle."
            )
        if self.in_messages and schedule is not None and not isinstance(schedule, Synchronous):
            raise Incompatible(
                f"{me} marks copies at the beginning of a round, which {type(schedule).__name__} does not have. Leave "
                "one of them out, or take the watermark waffle."
            )
        for what, mine, theirs in (("task", self.tasks, method.tasks), ("space", self.spaces, method.spaces)):
            if mine and theirs and not set(mine) & set(theirs):
                raise Incompatible(
                    f"{me} is for the {what} {' or '.join(mine)}, but {who} for {' or '.join(theirs)}. Leave {me} out."
                )

    @abstractmethod
    def draw(self, about: About, random: Draws) -> dict[str, Any]:
        """The content of a key: ``chance`` of one mark, and ``keys``, the marks by whose they are; plain values.

        Raises:
            RecipeError: no marks can be had here, or too few for the claimed rate.
        """

    def embed(self, owner: Owner, weights: Tensors) -> Tensors:
        """The weights that the server goes on with (server)."""
        return weights

    def dispatch(self, owner: Owner, messages: Mapping[str, Tensors]) -> Mapping[str, Tensors]:
        """What each client receives, by its name, instead of these weights (server)."""
        return messages

    def job(self, job: Fit, marks: Any, client: Client) -> Fit:
        """What a client trains instead of ``job`` (client).

        Args:
            job: its training.
            marks: those of the key that are the client's.
            client: who it is.
        """
        return job

    @classmethod
    @abstractmethod
    def matched(cls, marks: Any, suspect: Suspect) -> torch.Tensor:
        """Which of one set of marks a model matches, as independent trials, ``[n]``."""

    @classmethod
    def verify(cls, key: Key, suspect: Suspect) -> Verdict:
        """What a key says of a model. Of several sets of marks the best is taken, and the p-value multiplied by their
        number (Bonferroni)."""
        content = key.content
        found = {name: cls.matched(marks, suspect) for name, marks in content["keys"].items()}
        rates = {name: int(hits.sum()) / len(hits) for name, hits in found.items()}
        who = max(sorted(rates), key=rates.__getitem__)
        count, matches, allowed = len(found[who]), int(found[who].sum()), content["false_positive"]
        return Verdict(
            marks=count,
            matches=matches,
            threshold=chance.threshold(count, content["chance"], allowed / len(found)),
            p_value=min(1.0, len(found) * chance.tail(count, matches, content["chance"])),
            false_positive=allowed,
            who=who,
            rates=rates,
        )
