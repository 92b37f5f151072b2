"""The server's side: the link that asks the clients behind a Flower grid, and the app that runs a federation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedfm.core.method import Method
from fedfm.core.space import Layout
from fedfm.core.update import Member, Tensors
from fedfm.dedup.party import PHASES as COMPARISON
from fedfm.errors import BadUpdate, ClientError
from fedfm.links.flower.envelopes import Parcel, opened
from fedfm.links.flower.exchange import Exchange
from fedfm.links.flower.post import Answer, Key, Post
from fedfm.links.flower.roll import Roll
from fedfm.links.link import Reply
from fedfm.links.tickets import AS_IT_IS, NEVER, Ticket, alike, digest, in_order
from fedfm.store.clients import ClientStore
from fedfm.train.trainer import Trainer
from fedfm.wire import codec
from fedfm.wire.stage import Stage

if TYPE_CHECKING:
    from fedfm.deploy.guard import Guard
    from fedfm.federation import Federation
    from fedfm.secure.secure import Secure

MOST = 1e9
"""Steps or seconds of one task that a client may claim."""
SLACK_S = 60.0
"""Seconds that transport may take beside the client's own work."""


@dataclass(frozen=True)
class Delivery:
    """How long the server waits, for how many, and where large payloads lie.

    Args:
        patience_s: how long a site may be out of reach, or its app fail, before it is dropped; lost messages are sent
            again. 0 means that the first error is final.
        deadline_s: seconds after which a question ends without those who have not answered.
        enough: answers with which a question ends without the others; 0 means all, as do comparisons of rows.
        spool: folder for payloads that are too large for a message; without it, all travel in one.
        most_bytes: size of an update beyond which it is not fetched.
        tell: told what is being waited for; with nothing, that the waiting is over.
    """

    patience_s: float = 0.0
    deadline_s: float = math.inf
    enough: int = 0
    spool: Path | None = None
    most_bytes: int = 64 << 30
    tell: Callable[[str], None] = lambda text: None


@dataclass(frozen=True)
class _Flight:
    """A task that was begun and not waited for."""

    member: Member
    phase: str
    ticket: Ticket
    parcel: Parcel


class FlowerLink:
    """Asks the clients behind a Flower grid. :func:`over` makes the class that a ``Federation`` takes as its link.

    Args:
        method: the federated method.
        trainer: not used; clients have their own.
        store: remembers which task of each client was admitted last.
        grid: reaches the nodes.
        roll: which node speaks for which member; made from the grid when absent.
        stages: done to every upload.
        secure: how uploads are summed; clients take part in it.
        seed: the run's seed.
        layout: not used; clients have their own.
        hide_metrics: clients send no metrics.
        timeout_s: seconds a client may work on one task. When nobody answered for so long, and ``SLACK_S`` more, those
            who are still missing are late. 0 means no limit but the deadline.
        on_step: told of the steps of each reply; may raise ``Stopped``.
        clock: seconds, monotonic.
        guard: signs what is sent, checks what comes and writes the audit log.
        delivery: how long to wait, and for how many.
    """

    simulated: ClassVar[bool] = False

    def __init__(
        self,
        method: Method,
        trainer: Trainer | None,
        store: ClientStore,
        *,
        grid: Grid,
        roll: Roll | None = None,
        stages: Sequence[Stage] = (),
        secure: Secure | None = None,
        seed: int = 0,
        layout: Layout | None = None,
        hide_metrics: bool = False,
        timeout_s: float = 0.0,
        on_step: Callable[[int], None] = lambda steps: None,
        clock: Callable[[], float] = time.monotonic,
        guard: Guard | None = None,
        delivery: Delivery | None = None,
    ) -> None:
        self.method = method
        self.guard = guard
        self.ledger = store
        self.delivery = delivery or Delivery()
        self.roll = roll or Roll(grid, guard, clock)
        self.on_step = on_step
        idle_s = timeout_s + SLACK_S if timeout_s else math.inf
        post = Post(grid, self.roll, self.delivery.patience_s, self.delivery.deadline_s, idle_s, clock)
        self.exchange = Exchange(post, guard, self.delivery.spool, self.delivery.most_bytes)
        self._alike = alike(method, stages, seed, hide_metrics, secure)
        self._questions = 0
        self._held: dict[Key, Answer] = {}
        self._good: set[Key] = set()
        self._flights: dict[Key, _Flight] = {}
        self._admitted: dict[str, tuple[Member, str, int]] = {}

    def ask(self, phase: str, round: int, messages: Mapping[Member, Tensors]) -> Iterator[Reply]:
        """One reply for each message, in the order of ids; clients work at the same time where the grid lets them."""
        ticket = self._ticket(round)
        members = sorted(messages, key=lambda m: m.id)
        parcels = self._packed(messages.values())
        self.roll.refresh()
        for member in members:
            self._put(member, phase, ticket, parcels[id(messages[member])])
        keys = {(member.id, ticket) for member in members}
        # Whose rows are not compared takes no part in the run, so there nobody is too slow.
        among = set() if phase in COMPARISON else keys
        try:
            for member in members:
                reply = self._reply(member, phase, ticket, self._awaited((member.id, ticket), among, phase))
                if not self.simulated:
                    self.on_step(reply.steps)
                yield replace(reply, bytes_down=parcels[id(messages[member])].size)
                del reply
        finally:
            for key in keys:
                self._forget(key)
            self._good -= keys
            self._remove(parcels.values())
        if self.simulated:
            # Here a client's memory goes with the process; elsewhere its next task will tell it.
            self.close()

    def begin(self, phase: str, round: int, messages: Mapping[Member, Tensors]) -> None:
        """Give clients a task and do not wait; :meth:`arrived` brings the replies."""
        self.roll.refresh()
        parcels = self._packed(messages.values())
        for member, message in messages.items():
            ticket = self._ticket(round)
            flight = _Flight(member, phase, ticket, parcels[id(message)])
            self._flights[member.id, ticket] = flight
            self._put(member, phase, ticket, flight.parcel)

    @property
    def in_flight(self) -> set[str]:
        """Clients with a task that was begun and whose reply was not taken."""
        return {flight.member.id for flight in self._flights.values()}

    def arrived(self) -> Reply:
        """The next reply to what was begun. There must be something in flight."""
        while not (landed := self._held.keys() & self._flights.keys()):
            self._take("what was begun")
        key = min(landed)
        flight = self._flights.pop(key)
        self._good.discard(key)
        reply = self._reply(flight.member, flight.phase, flight.ticket, self._held.pop(key))
        if not any(other.parcel is flight.parcel for other in self._flights.values()):
            self._remove([flight.parcel])
        self.on_step(reply.steps)
        return replace(reply, bytes_down=flight.parcel.size)

    def close(self) -> None:
        """Tell those whose update was admitted, so that nothing is pending. Who misses it reads it in its next task."""
        keys = set()
        for member, phase, round in self._admitted.values():
            settings = self._settings(member, phase, round)
            keys.add(key := (member.id, self._ticket(round)))
            self.exchange.put(key, member.id, "query.settle", settings, Parcel([], 0, digest(b"")), "settle")
        self._admitted = {}
        for key in keys:
            self._awaited(key, set(), "what was admitted")

    def _ticket(self, round: int) -> Ticket:
        self._questions += 1
        return round, self._questions

    def _packed(self, messages: Iterable[Tensors]) -> dict[int, Parcel]:
        """Messages by identity: most methods send everybody the same tensors, which are packed once."""
        parcels: dict[int, Parcel] = {}
        for message in messages:
            if id(message) not in parcels:
                parcels[id(message)] = Parcel.of(message, self.delivery.spool)
        return parcels

    def _put(self, member: Member, phase: str, ticket: Ticket, parcel: Parcel) -> None:
        kind = "evaluate" if phase in self.method.scoring else "train"
        settings = {"ticket": list(ticket), **self._settings(member, phase, ticket[0])}
        self.exchange.put((member.id, ticket), member.id, kind, settings, parcel)

    def _settings(self, member: Member, phase: str, round: int) -> dict[str, Any]:
        noted = self.ledger.get(member.id)
        accepted = noted["ticket"].tolist() if noted else list(AS_IT_IS if self.simulated else NEVER)
        waiting = {"patience_s": self.delivery.patience_s} if self.delivery.patience_s else {}
        return {"phase": phase, "round": round, "client": member.id, "accepted": accepted, **self._alike, **waiting}

    def _awaited(self, key: Key, among: set[Key], phase: str) -> Answer:
        """The answer to one question; those that come before it are held.

        Args:
            key: the question.
            among: questions of which enough answers end the others.
            phase: what is asked, for those who look on.
        """
        while key not in self._held:
            self._take(f"round {key[1][0]}, {phase}")
            if 0 < self.delivery.enough <= (answered := len(among & self._good)):
                self._end(among, answered)
        return self._held.pop(key)

    def _end(self, among: set[Key], answered: int) -> None:
        """The question goes on without those who have not answered."""
        why = f"late: the round went on with the {answered} who had answered"
        for key in among:
            if self.exchange.withdraw(key):
                # It is still at work: it is asked again when it has said that it is free.
                self.roll.lose(key[0], why)
                self._held[key] = Answer(reason=why)

    def _take(self, what: str) -> None:
        """Wait for one answer, whichever comes."""
        self.delivery.tell(f"{what}: waits for {', '.join(sorted({key[0] for key in self.exchange.questions}))}")
        key, answer = self.exchange.take()
        self._held[key] = answer
        if answer.content is not None and dict(answer.content.get("done", {})).get("status") == "done":
            self._good.add(key)
        if not self.exchange.questions:
            self.delivery.tell("")

    def _forget(self, key: Key) -> None:
        self.exchange.withdraw(key)
        if (held := self._held.pop(key, None)) and held.file:
            held.file.unlink(missing_ok=True)

    def _remove(self, parcels: Iterable[Parcel]) -> None:
        for parcel in parcels:
            if parcel.file:
                parcel.file.unlink(missing_ok=True)

    def _reply(self, member: Member, phase: str, ticket: Ticket, answer: Answer) -> Reply:
        what = {"kind": "update", "phase": phase, "round": ticket[0], "client": member.id}
        try:
            if answer.content is None:
                raise BadUpdate(answer.reason)
            content = opened(self.guard, member.id, answer.content, answer.signed, answer.file)
            reply = self._read(member, phase, ticket, answer)
        except BadUpdate as error:
            reply = Reply(member, None, str(error))
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
            reply = Reply(member, None, f"the reply is not one of fedfm: {error!r}")
        finally:
            if answer.file:
                # Tensors keep what they are mapped from.
                answer.file.unlink(missing_ok=True)
        if self.guard is None:
            return reply
        guard = self.guard
        if reply.update is None:
            guard.note("refused", **what, reason=reply.reason)
            return reply
        what |= {"holds": reply.update.kind.value, "bytes": reply.bytes_up, "sha256": content.hex()}
        guard.note("received", **what)

        def accept() -> None:
            reply.accept()
            guard.note("admitted", **what)

        return replace(reply, accept=accept)

    def _read(self, member: Member, phase: str, ticket: Ticket, answer: Answer) -> Reply:
        done = answer.content["done"]
        status, reason, seconds, steps = done["status"], str(done["reason"]), float(done["seconds"]), int(done["steps"])
        if not (0 <= seconds <= MOST and 0 <= steps <= MOST):
            raise BadUpdate(f"it claims {steps} steps in {seconds} s")
        if status == "defect" and self.simulated:
            # Elsewhere a client is not believed: whoever claims a defect could end the run of all.
            raise ClientError(reason, client=member.id, round=ticket[0], phase=phase, job=done["job"] or None)
        if status != "done":
            return Reply(member, None, reason or "it failed", seconds=seconds)
        data = answer.content["up"]["bytes"].data
        size = len(data) + (answer.file.stat().st_size if answer.file else 0)
        update = codec.decode(data, member.id, answer.file)
        update = replace(update, tensors=in_order(update.tensors, done["order"]))
        reply = Reply(member, update, "", 0, size if update.tensors or update.metrics else 0, seconds, steps)
        return replace(reply, accept=partial(self._accept, member, phase, ticket)) if done["keeps"] else reply

    def _accept(self, member: Member, phase: str, ticket: Ticket) -> None:
        self.ledger.put(member.id, ticket[0], {"ticket": torch.tensor(ticket)})
        self._admitted[member.id] = member, phase, ticket[0]


def over(
    grid: Grid, roll: Roll | None = None, guard: Guard | None = None, delivery: Delivery | None = None
) -> type[FlowerLink]:
    """The link over a grid, as the class that ``Federation(..., link=...)`` takes."""

    class Over(FlowerLink):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, grid=grid, roll=roll, guard=guard, delivery=delivery, **kwargs)

    return Over


def server_app(
    federation: Callable[[Roll, type[FlowerLink], Context], Federation], least: int = 1, **run: Any
) -> ServerApp:
    """A ServerApp that waits for the members and runs their federation.

    Args:
        federation: makes it from the members, the link and the app's context.
        least: members that must be there before the run starts.
        run: arguments of ``Federation.run``, such as ``folder``.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        roll = Roll(grid)
        roll.wait(least)
        federation(roll, over(grid, roll), context).run(**run)

    return app
