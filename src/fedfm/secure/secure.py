"""The contract of secure aggregation: what a run needs for it, and how the vectors are made that it sums.

Weights are hidden, too: a client multiplies its values by its weight before they are masked or encrypted, and sends the
weight as a further coordinate. So any weighted mean can be had, and no part is needed that makes weights equal.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from fedfm.core.method import Method
from fedfm.core.traits import Part, Trait, Traits
from fedfm.core.update import Kind, Member, Tensors, Update
from fedfm.errors import Incompatible, RecipeError, require
from fedfm.secure.fixed_point import FixedPoint
from fedfm.secure.gather import LEAST, Gathering
from fedfm.secure.parties import Parties
from fedfm.wire.stage import Setting, Stage

if TYPE_CHECKING:
    from fedfm.core.jobs import Job
    from fedfm.core.method import Client
    from fedfm.server import RoundServer

    Study = Callable[[Client, Tensors], Job]
    """The job by which a client looks at its rows, given what it received without what is for the protocol."""


@dataclass(frozen=True)
class Secure(Part, ABC):
    """Subclasses are frozen dataclasses which say what clients and server do in a round.

    Args:
        bits: of a value with its sign.
        max_value: larger values are clamped; how many were is in the round's record.
        max_weight: the largest weight of a client, such as its number of examples.
    """

    id: ClassVar[str]
    # One question a round: uploads of tasks that are only summed at the end would be seen before.
    needs: ClassVar[Traits] = frozenset({Trait.LINEAR, Trait.ALIGNED, Trait.DENSE, Trait.ONE_ASK})
    breaks: ClassVar[Traits] = frozenset({Trait.VISIBLE})
    instead: ClassVar[dict[Trait, str]] = {
        Trait.LINEAR: "Only sums can be hidden: choose a method that averages, such as fedavg or fedit, or leave "
        "secure out.",
        Trait.ALIGNED: "All must upload the same tensors: give all clients one rank, choose a method such as fedit, or "
        "leave secure out.",
        Trait.DENSE: "All coordinates are summed, also those that are zero: leave out what makes uploads sparse, or "
        "secure.",
        Trait.ONE_ASK: "Choose a method with one question a round, such as fedavg or fedit, or leave secure out.",
        Trait.VISIBLE: "The sum is all that the server sees: leave out what looks at single uploads, or secure.",
    }
    kinds: ClassVar[frozenset[Kind]] = frozenset({Kind.DELTA, Kind.WEIGHTS})
    phases: ClassVar[tuple[str, ...]] = ()
    """The client tasks of the protocol, around the method's own."""
    public: ClassVar[bool] = False
    """Whether the server looks at rows that it has."""
    tells: ClassVar[str] = ""
    """What the server learns of a single upload all the same; nothing where it is empty."""
    resists: ClassVar[bool] = False
    """Whether it bounds what one client can do."""
    blurs: ClassVar[bool] = False
    """Whether clients can add noise to the integers, as they see to it that a sum has enough of it."""

    bits: int = 24
    max_value: float = 1.0
    max_weight: int = 65536

    def __post_init__(self) -> None:
        require(self, "bits", 2 <= self.bits <= 32, "from 2 to 32")
        require(self, "max_value", 0 < self.max_value < math.inf, "above 0 and finite")
        require(self, "max_weight", self.max_weight >= 1, "at least 1")
        self.see_room(LEAST, self.fixed_point)

    @property
    def fixed_point(self) -> FixedPoint:
        """How values become integers."""
        return FixedPoint(self.bits, self.max_value, self.max_weight)

    def code(self, stages: Sequence[Stage]) -> FixedPoint:
        """How values become integers behind these stages, with a coordinate more for each bit that these send."""
        return replace(self.fixed_point, beside=tuple(name for stage in stages for name in stage.beside))

    @abstractmethod
    def parties(self, stages: Sequence[Stage] = ()) -> Parties:
        """The clients of one process, as this protocol sees them behind these stages."""

    @abstractmethod
    def gathering(self, server: RoundServer, phase: str, messages: Mapping[Member, Tensors], round: int) -> Gathering:
        """One question of a method under way; arguments as of :class:`fedfm.secure.gather.Gathering`."""

    def gathered(self, server: RoundServer, phase: str, messages: Mapping[Member, Tensors], round: int) -> list[Update]:
        """The mean of clients' uploads as one update, or nothing if nobody was asked.

        Raises:
            TooFewUpdates: too few clients were left for the sum to be seen; nothing of the round counts.
        """
        return [self.gathering(server, phase, messages, round).gathered()] if messages else []

    def study(self, phase: str, method: Method) -> Study | None:
        """How a client looks at its rows in a task of the protocol; ``None`` where it looks at none.

        Args:
            phase: the task.
            method: the federated method.
        """
        return None

    def fits(self, method: Method, setting: Setting) -> None:
        """See, before the run, that it can sum what the method and the stages send.

        Raises:
            Incompatible: what is sent cannot be summed.
            RecipeError: too few clients take part, or so many that a sum could overflow.
        """
        me, who = type(self).__name__, type(method).__name__
        for phase in method.phases:
            if (kind := method.kind(phase)) not in self.kinds:
                raise Incompatible(
                    f"{me} sums changes of weights or weights, but {who} sends {kind} in its task {phase!r}. Leave "
                    "secure out."
                )
        if type(method).read is not Method.read:
            raise Incompatible(f"{me} hides single uploads, but {who} reads each of them. Leave secure out.")
        for stage in setting.stages:
            if stage.packs:
                raise Incompatible(
                    f"{me} sums numbers, but {type(stage).__name__} packs them into another form. Leave it out: bits "
                    f"of {me} says how many a value takes."
                )
        if setting.expected < LEAST:
            raise RecipeError(
                f"{me} needs at least {LEAST} clients in a round, but the sampler draws {setting.expected:g} of "
                f"{setting.population} on average. Let more take part, or leave secure out."
            )
        if not any(stage.summed and getattr(stage, "target_epsilon", 0) for stage in setting.stages):
            code = self.code(setting.stages)  # Where noise is still to be worked out, it is seen to afterwards.
            self.see_room(setting.population, code)
            code.fits(setting.population)

    def see_room(self, clients: int, code: FixedPoint) -> None:
        """See that a sum over so many clients cannot overflow.

        Raises:
            RecipeError: it could.
        """
        if (width := code.width(clients)) > 8:
            raise RecipeError(
                f"{type(self).__name__}: a sum over {clients} clients of values of {code.bits} bits with weights up to "
                f"{code.max_weight} takes {width} bytes, more than 8, and could overflow. Lower bits or max_weight, or "
                "put Clip into stages, which gives all clients weight 1, and set max_weight to 1."
            )
