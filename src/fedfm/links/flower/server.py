"""The server's side: who is there, the link that asks them, and the app that runs a federation."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from safetensors.torch import save

from fedfm.core import trees
from fedfm.core.method import Method
from fedfm.core.plan import Members
from fedfm.core.space import Layout
from fedfm.core.update import Member, Tensors
from fedfm.errors import BadUpdate, ClientError, DataError, FedfmError
from fedfm.links.flower.client import packed
from fedfm.links.link import Reply
from fedfm.links.tickets import AS_IT_IS, NEVER, Ticket, alike, digest, in_order, order
from fedfm.store.clients import ClientStore
from fedfm.train.trainer import Trainer
from fedfm.wire import codec
from fedfm.wire.stage import Stage

if TYPE_CHECKING:
    from fedfm.deploy.guard import Guard
    from fedfm.federation import Federation

PAUSE_S = 0.2
"""Seconds between two looks for replies."""
MOST = 1e9
"""Steps or seconds of one task that a client may claim."""
SLACK_S = 60.0
"""Seconds that transport may take beside the client's own work."""


class Roll:
    """The members whose nodes answered: who they are, not what they have.

    Args:
        grid: reaches the nodes.
        wait_s: seconds that a node may take to say who it is.
        guard: signs what is sent and checks what comes, where server and clients do not trust the way between them.
    """

    def __init__(self, grid: Grid, wait_s: float = SLACK_S, guard: Guard | None = None) -> None:
        self.grid = grid
        self.wait_s = wait_s
        self.guard = guard
        self.nodes: dict[str, int] = {}
        self.refused: dict[int, str] = {}
        self._members: dict[str, Member] = {}
        self._known: set[int] = set()

    @property
    def ids(self) -> Sequence[str]:
        return sorted(self._members)

    def member(self, id: str) -> Member:
        return self._members[id]

    def rows(self, id: str, split: str) -> NoReturn:
        raise DataError(f"the rows of client {id!r} are on its own machine; the server has none")

    def pooled(self) -> Members:
        raise DataError("the clients' rows are on their own machines; nobody can pool them")

    def wait(self, least: int, patience_s: float = math.inf) -> None:
        """Return when ``least`` members are there.

        Raises:
            FedfmError: they are not after ``patience_s`` seconds; says who is, and why others were refused.
        """
        began = time.monotonic()
        self.refresh()
        while len(self.nodes) < least:
            if time.monotonic() - began > patience_s:
                there = ", ".join(sorted(self.nodes)) or "nobody"
                refused = "".join(f"; node {node} was refused: {why}" for node, why in self.refused.items())
                raise FedfmError(
                    f"{least} sites must be there, but after {patience_s:g} s there is {there}{refused}. Start the "
                    "missing ones, or lower least."
                )
            time.sleep(PAUSE_S)
            self.refresh()

    def refresh(self) -> None:
        """Ask nodes that are new who they are. While a node is there, no other speaks for its member."""
        online = set(self.grid.get_node_ids())
        self.nodes = {member: node for member, node in self.nodes.items() if node in online}
        self._known &= online
        new, signed = {}, {}
        for node in sorted(online - self._known):
            new[node], signed[node] = sealed(self.guard, "hello", {})
        for node, reply in _answers(self.grid, "query.hello", new, self.wait_s):
            self._known.add(node)
            try:
                member = _introduced(reply, self.guard, signed[node])
                if member.id in self.nodes:
                    raise BadUpdate(f"node {self.nodes[member.id]} already speaks for {member.id!r}")
            except BadUpdate as error:
                warnings.warn(f"Flower node {node} takes no part: {error}", stacklevel=2)
                self.refused[node] = str(error)
                if self.guard:
                    self.guard.note("refused", kind="hello", node=node, reason=str(error))
                continue
            if self.guard:
                self.guard.note("joined", kind="hello", node=node, client=member.id, examples=member.examples)
            self.nodes[member.id] = node
            self._members[member.id] = member


class FlowerLink:
    """Asks the clients behind a Flower grid. :func:`over` makes the class that a ``Federation`` takes as its link.

    Args:
        method: the federated method.
        trainer: not used; clients have their own.
        store: remembers which task of each client was admitted last.
        grid: reaches the nodes.
        roll: which node speaks for which member; made from the grid when absent.
        stages: done to every upload.
        seed: the run's seed.
        layout: not used; clients have their own.
        hide_metrics: clients send no metrics.
        timeout_s: seconds a client may work on one task. When nobody answered for so long, and ``SLACK_S`` more, those
            who are still missing are late. 0 means no limit but Flower's, which answers for nodes that are gone.
        on_step: told of the steps of each reply; may raise ``Stopped``.
        clock: seconds, monotonic.
        guard: signs what is sent, checks what comes and writes the audit log.
    """

    simulated: ClassVar[bool] = False

    def __init__(
        self,
        method: Method,
        trainer: Trainer,
        store: ClientStore,
        *,
        grid: Grid,
        roll: Roll | None = None,
        stages: Sequence[Stage] = (),
        seed: int = 0,
        layout: Layout | None = None,
        hide_metrics: bool = False,
        timeout_s: float = 0.0,
        on_step: Callable[[int], None] = lambda steps: None,
        clock: Callable[[], float] = time.monotonic,
        guard: Guard | None = None,
    ) -> None:
        self.method = method
        self.guard = guard
        self.ledger = store
        self.grid = grid
        self.roll = roll or Roll(grid)
        self.timeout_s = timeout_s
        self.on_step = on_step
        self.clock = clock
        self._alike = alike(method, stages, seed, hide_metrics)
        self._asked = 0
        self._admitted: list[Member] = []

    def ask(self, phase: str, round: int, messages: Mapping[Member, Tensors]) -> Iterator[Reply]:
        """One reply for each message, in the order of ids; clients work at the same time where the grid lets them."""
        self._asked += 1
        ticket = (round, self._asked)
        self.roll.refresh()
        members = sorted(messages, key=lambda m: m.id)
        ready_made: dict[int, _Message] = {}
        contents, ready, signed = {}, {}, {}
        for member in members:
            message = messages[member]
            # Most methods send everybody the same tensors: those are packed once.
            if id(message) not in ready_made:
                ready_made[id(message)] = _Message.of(message)
            down = ready_made[id(message)]
            node = self.roll.nodes.get(member.id)
            if node is None:
                ready[member.id] = Reply(member, None, "no Flower node speaks for it")
                continue
            settings = {"order": down.order, "ticket": list(ticket), **self._settings(member, phase, round)}
            contents[node], signed[node] = sealed(self.guard, "task", settings, down)
        kind = "evaluate" if phase in self.method.scoring else "train"
        waiting = {self.roll.nodes[m.id]: m for m in members if m.id not in ready}
        wait_s = self.timeout_s + SLACK_S if self.timeout_s else math.inf
        answers = _answers(self.grid, kind, contents, wait_s, self.clock)
        for member in members:
            while member.id not in ready:
                node, answer = next(answers)
                sender = waiting[node]
                reply = self._reply(sender, phase, ticket, answer, signed[node])
                ready[sender.id] = replace(reply, bytes_down=ready_made[id(messages[sender])].size)
                if not self.simulated:
                    self.on_step(ready[sender.id].steps)
            yield ready.pop(member.id)
        self._settle(phase, round)

    def _settings(self, member: Member, phase: str, round: int) -> dict[str, Any]:
        noted = self.ledger.get(member.id)
        accepted = noted["ticket"].tolist() if noted else list(AS_IT_IS if self.simulated else NEVER)
        return {"phase": phase, "round": round, "client": member.id, "accepted": accepted, **self._alike}

    def _reply(self, member: Member, phase: str, ticket: Ticket, answer: Message | None, signed: bytes) -> Reply:
        reply = self._understood(member, phase, ticket, answer, signed)
        if self.guard is None:
            return reply
        what = {"kind": "update", "phase": phase, "round": ticket[0], "client": member.id}
        if reply.update is None:
            self.guard.note("refused", **what, reason=reply.reason)
            return reply
        guard, data = self.guard, answer.content["up"]["bytes"].data  # type: ignore[union-attr, call-overload]
        what |= {"holds": reply.update.kind.value, "bytes": len(data), "sha256": digest(data).hex()}
        guard.note("received", **what)

        def accept() -> None:
            reply.accept()
            guard.note("admitted", **what)

        return replace(reply, accept=accept)

    def _understood(self, member: Member, phase: str, ticket: Ticket, answer: Message | None, signed: bytes) -> Reply:
        if answer is None:
            return Reply(member, None, f"late: no answer in {self.timeout_s + SLACK_S:g} s")
        if answer.has_error():
            lines = (answer.error.reason or "").strip().splitlines() or ["no reason given"]
            return Reply(member, None, f"Flower error {answer.error.code}: {lines[-1]}")
        try:
            opened(self.guard, member.id, answer.content, signed)
            return self._read(member, phase, ticket, answer.content)
        except BadUpdate as error:
            return Reply(member, None, str(error))
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
            return Reply(member, None, f"the reply is not one of fedfm: {error!r}")

    def _read(self, member: Member, phase: str, ticket: Ticket, content: Any) -> Reply:
        done = content["done"]
        status, reason, seconds, steps = done["status"], str(done["reason"]), float(done["seconds"]), int(done["steps"])
        if not (0 <= seconds <= MOST and 0 <= steps <= MOST):
            raise BadUpdate(f"it claims {steps} steps in {seconds} s")
        if status == "defect" and self.simulated:
            # Elsewhere a client is not believed: whoever claims a defect could end the run of all.
            raise ClientError(reason, client=member.id, round=ticket[0], phase=phase, job=done["job"] or None)
        if status != "done":
            return Reply(member, None, reason or "it failed", seconds=seconds)
        data = content["up"]["bytes"].data
        update = codec.decode(data, member.id)
        update = replace(update, tensors=in_order(update.tensors, done["order"]))
        up = len(data) if update.tensors or update.metrics else 0
        reply = Reply(member, update, "", 0, up, seconds, steps)
        return replace(reply, accept=partial(self._accept, member, ticket)) if done["keeps"] else reply

    def _accept(self, member: Member, ticket: Ticket) -> None:
        self.ledger.put(member.id, ticket[0], {"ticket": torch.tensor(ticket)})
        self._admitted.append(member)

    def _settle(self, phase: str, round: int) -> None:
        """Tell those whose update was admitted. Who does not answer will read it in its next task."""
        contents = {
            self.roll.nodes[m.id]: sealed(self.guard, "settle", self._settings(m, phase, round))[0]
            for m in self._admitted
        }
        self._admitted = []
        for _ in _answers(self.grid, "query.settle", contents, SLACK_S, self.clock):
            pass


@dataclass(frozen=True)
class _Message:
    """What clients are sent, packed.

    Args:
        record: the bytes.
        order: in which the tensors were.
        size: bytes that count; none when there are no tensors.
        content: digest of the bytes.
    """

    record: ArrayRecord
    order: list[int]
    size: int
    content: bytes

    @classmethod
    def of(cls, tensors: Tensors) -> _Message:
        data = save(trees.unshared(tensors))
        return cls(packed(data), order(tensors), len(data) if tensors else 0, digest(data))


def sealed(
    guard: Guard | None, kind: str, settings: dict[str, Any], down: _Message | None = None
) -> tuple[RecordDict, bytes]:
    """A message as it travels, and its signature where there is a guard.

    Args:
        guard: signs.
        kind: ``hello``, ``task`` or ``settle``.
        settings: of the message.
        down: the tensors.
    """
    signature = b""
    records: dict[str, Any] = {"down": down.record} if down else {}
    if guard:
        settings, signature = guard.close(kind, settings, down.content if down else digest(b""))
        records["seal"] = ConfigRecord({"signature": signature})
    return RecordDict({"task": ConfigRecord(settings), **records}), signature


def opened(guard: Guard | None, client: str, content: Any, signed: bytes) -> None:
    """See that a reply is from ``client`` and to the message so ``signed``.

    Raises:
        BadUpdate: it is not.
    """
    if guard:
        up = content["up"]["bytes"].data if "up" in content else b""
        guard.open(client, content["seal"]["signature"], dict(content["done"]), digest(up), signed)


def over(grid: Grid, roll: Roll | None = None, guard: Guard | None = None) -> type[FlowerLink]:
    """The link over a grid, as the class that ``Federation(..., link=...)`` takes."""

    class Over(FlowerLink):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, grid=grid, roll=roll, guard=guard, **kwargs)

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


def _answers(
    grid: Grid,
    kind: str,
    contents: Mapping[int, RecordDict],
    wait_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[tuple[int, Message | None]]:
    """Nodes and their replies as they come; ``None`` for those that are missing when nothing came for ``wait_s``."""
    messages = [grid.create_message(content, kind, node, "", None) for node, content in contents.items()]
    taken = set(grid.push_messages(messages)) if messages else set()
    waiting = {m.metadata.message_id: m.metadata.dst_node_id for m in messages if m.metadata.message_id in taken}
    yield from ((m.metadata.dst_node_id, None) for m in messages if m.metadata.message_id not in waiting)
    last = clock()
    while waiting and clock() - last <= wait_s:
        came = [reply for reply in grid.pull_messages(list(waiting)) if reply.metadata.reply_to_message_id in waiting]
        if not came:
            time.sleep(PAUSE_S)
        while came:
            yield waiting.pop(came[-1].metadata.reply_to_message_id), came.pop()
            last = clock()
    yield from ((node, None) for node in waiting.values())


def _introduced(reply: Message | None, guard: Guard | None, signed: bytes) -> Member:
    """The member that a node says it is.

    Raises:
        BadUpdate: it does not say, or not so that it can be believed.
    """
    if reply is None or reply.has_error():
        raise BadUpdate(f"it does not say who it is: {reply and reply.error.reason}")
    try:
        content: Any = reply.content
        done = dict(content["done"])
        if "client" not in done:
            raise BadUpdate(f"it does not say who it is: {done.get('reason', 'and not why')}")
        id, examples = done.pop("client"), done.pop("examples")
        if not (isinstance(id, str) and id and isinstance(examples, int) and examples >= 0):
            raise BadUpdate(f"it calls itself {id!r} with {examples!r} examples")
        opened(guard, id, content, signed)
        return Member(id, examples, {name: float(value) for name, value in done.items()})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadUpdate(f"it does not say who it is: {error!r}") from error
