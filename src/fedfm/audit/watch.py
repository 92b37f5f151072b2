"""A round of a run done once more, to see what the server saw in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedfm.core.method import State
from fedfm.core.traits import Trait
from fedfm.core.update import Kind, Tensors, Update
from fedfm.errors import RecipeError, Stopped
from fedfm.federation import Federation
from fedfm.links.link import Link, Reply
from fedfm.rounds import Rounds
from fedfm.wire.stage import received

Alter = Callable[[str, Tensors], Tensors]
"""Given the id of a client and what it would receive in the round, says which tensors it receives instead, by name; the
others stay as they are."""


@dataclass(frozen=True)
class Heard:
    """What came from a client.

    Args:
        phase: in answer to which task.
        member: id of the client.
        message: what it had received, also where that was altered.
        update: as it came.
    """

    phase: str
    member: str
    message: Tensors
    update: Update


@dataclass(frozen=True)
class Exposed:
    """A change of weights that the server can read.

    Args:
        clients: whose: one, or all of a round where it reads their mean alone.
        start: the tuned tensors from which they began.
        change: what they changed; of several their mean.
    """

    clients: tuple[str, ...]
    start: Tensors
    change: Tensors


@dataclass
class Watched:
    """A round as the server saw it.

    Args:
        federation: whose.
        round: its number.
        before: the global model at its beginning.
        after: and at its end.
        heard: all that came from clients.
    """

    federation: Federation
    round: int
    before: Tensors = field(default_factory=dict)
    after: Tensors = field(default_factory=dict)
    heard: list[Heard] = field(default_factory=list)

    @property
    def single(self) -> bool:
        """Whether the server reads uploads one by one."""
        return self.federation.secure is None

    def exposed(self) -> list[Exposed]:
        """The changes of weights that the server could read: each client's, or where they are summed unseen the mean.

        Noise that clients added is in them. Noise that the server adds to the mean is not, where it reads uploads one
        by one: it sees them before that. Of a hidden sum they are the change of the global model, with all that stages
        and server rule made of it.
        """
        method, phase = self.federation.method, self.federation.method.phases[-1]
        uploads = [heard for heard in self.heard if heard.phase == phase]
        if not self.single:
            names = {heard.member for heard in uploads}
            change = {n: self.after[n] - t for n, t in self.before.items() if not self.after[n].equal(t)}
            # They began from what they received: where that was altered, from the same, as nothing else is read.
            sent = next((heard.message for heard in uploads), {})
            start = {name: sent.get(name, tensor) for name, tensor in self.before.items()}
            return [Exposed(tuple(sorted(names)), start, change)]
        found = []
        for heard in uploads:
            if method.kind(phase) is Kind.KNOWLEDGE:
                continue
            update = received(self.federation.stages, heard.update, method.expects(phase, heard.message))
            beside = {name for stage in self.federation.stages for name in stage.beside}
            start = {**self.before, **{n: t for n, t in heard.message.items() if n in update.tensors}}
            change = {
                name: tensor if update.kind is Kind.DELTA else tensor - start[name]
                for name, tensor in update.tensors.items()
                if name not in beside and name in start
            }
            found.append(Exposed((heard.member,), start, change))
        return found

    @property
    def hidden(self) -> bool:
        """Whether a stage or secure aggregation hides single uploads from who gets the mean."""
        return Trait.VISIBLE not in self.federation.composition[-1].after


class _Until(Rounds):
    """Rounds up to one, whose states are kept."""

    last: int = 0
    states: Sequence[State] = ()

    def _round(self, state: State, number: int, link: Link) -> tuple[State, dict[str, Any]]:
        after, record = super()._round(state, number, link)
        if number == self.last:
            self.states = (state, after)
            raise Stopped("the round that is looked at is done")
        return after, record


def watch(federation: Federation, round: int, alter: Alter | None = None) -> Watched:
    """Do the rounds of a run up to one again, and note what the server saw in that one.

    Args:
        federation: of the run.
        round: which one.
        alter: what the server hands out in it; as it should unless given. Names and shapes must stay.

    Raises:
        RecipeError: the run does not get there, as its budget of privacy is spent before.
    """
    run = federation.on(federation.members)
    found = Watched(run, round)

    def listen(phase: str, number: int, message: Tensors, reply: Reply) -> None:
        if reply.update is not None and number == round:
            found.heard.append(Heard(phase, reply.member.id, message, reply.update))

    def change(phase: str, number: int, client: str, message: Tensors) -> Tensors:
        chosen = alter is not None and number == round and phase in run.method.phases
        return {**message, **alter(client, message)} if alter and chosen else message

    again = _Until(run, None, (), listen=listen, alter=change)
    again.last = round
    again.run(False)
    if not again.states:
        raise RecipeError(f"the run ends before round {round}, as its privacy is spent. Look at an earlier round.")
    found.before, found.after = (run.result(state) for state in again.states)
    return found
