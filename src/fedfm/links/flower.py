"""The Flower link: the same method as a Flower ServerApp and ClientApp. The only file that imports ``flwr``.

A task is one Flower message to the node that speaks for a client, its answer one reply:

=========  ==========  ========================================================================================
record     entry       content
=========  ==========  ========================================================================================
``task``   settings    phase, round, client, tickets, settings that both sides must have alike
``down``   ``bytes``   the message as safetensors
``done``   settings    status, reason, seconds, steps
``up``     ``bytes``   the update as :mod:`fedfm.wire.codec` wrote it
=========  ==========  ========================================================================================

Bytes travel in a Flower ``Array`` with ``dtype="uint8"`` and ``stype="fedfm"``: Flower carries them without looking in,
so bfloat16 and float8 survive. safetensors sorts by name; the order that the tensors had travels beside them, because a
norm adds up in that order, and runs are to be equal to the bit.

**Private state.** A task has a *ticket*: its round, and the how-manieth question of the link it is. What a client keeps
in a task is *pending*, on its own disk, until the server says that the update was admitted. The server notes the ticket
of each client's last admitted task in its own run folder, versioned as its checkpoints are, and every message names it.
A client then stores what is pending if it has that ticket, and forgets it if not; a ticket older than what it stored
means that the server went on from an earlier checkpoint, and the client goes back as far. So either side may crash at
any moment. At the end of a question, a message without a task says the same at once, so that nothing is pending when
the run ends; who misses it is told by its next task.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn
from uuid import uuid4

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.app import Metadata as Envelope
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from safetensors.torch import load, save

from fedfm.core import trees
from fedfm.core.method import Method
from fedfm.core.plan import Members
from fedfm.core.space import Layout
from fedfm.core.update import Member, Tensors
from fedfm.errors import BadUpdate, ClientError, DataError, RecipeError, StoreError
from fedfm.links.link import Reply
from fedfm.links.worker import Done, Worker
from fedfm.store.clients import ClientStore
from fedfm.train.trainer import Trainer
from fedfm.wire import codec
from fedfm.wire.stage import Stage

if TYPE_CHECKING:
    from fedfm.federation import Federation

Ticket = tuple[int, int]
NEVER: Ticket = (0, 0)
"""No task of this client was admitted."""
AS_IT_IS: Ticket = (-1, -1)
"""The server looks after the client's store itself."""
PAUSE_S = 0.2
"""Seconds between two looks for replies."""
SLACK_S = 60.0
"""Seconds that transport may take beside the client's own work."""


class Roll:
    """The members whose nodes answered: who they are, not what they have.

    Args:
        grid: reaches the nodes.
        wait_s: seconds that a node may take to say who it is.
    """

    def __init__(self, grid: Grid, wait_s: float = SLACK_S) -> None:
        self.grid = grid
        self.wait_s = wait_s
        self.nodes: dict[str, int] = {}
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

    def wait(self, least: int) -> None:
        """Return when ``least`` members are there."""
        self.refresh()
        while len(self.nodes) < least:
            time.sleep(PAUSE_S)
            self.refresh()

    def refresh(self) -> None:
        """Ask nodes that are new who they are. While a node is there, no other speaks for its member."""
        online = set(self.grid.get_node_ids())
        self.nodes = {member: node for member, node in self.nodes.items() if node in online}
        self._known &= online
        new = {node: RecordDict() for node in sorted(online - self._known)}
        for node, reply in _answers(self.grid, "query.hello", new, self.wait_s):
            self._known.add(node)
            try:
                member = _introduced(reply)
                if member.id in self.nodes:
                    raise BadUpdate(f"node {self.nodes[member.id]} already speaks for {member.id!r}")
            except BadUpdate as error:
                warnings.warn(f"Flower node {node} takes no part: {error}", stacklevel=2)
                continue
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
    ) -> None:
        self.method = method
        self.ledger = store
        self.grid = grid
        self.roll = roll or Roll(grid)
        self.timeout_s = timeout_s
        self.on_step = on_step
        self.clock = clock
        self._alike = _alike(method, stages, seed, hide_metrics)
        self._asked = 0
        self._admitted: list[Member] = []

    def ask(self, phase: str, round: int, messages: Mapping[Member, Tensors]) -> Iterator[Reply]:
        """One reply for each message, in the order of ids; clients work at the same time where the grid lets them."""
        self._asked += 1
        ticket = (round, self._asked)
        self.roll.refresh()
        order = sorted(messages, key=lambda m: m.id)
        packed: dict[int, tuple[int, ArrayRecord, list[int]]] = {}
        contents, ready = {}, {}
        for member in order:
            message = messages[member]
            # Most methods send everybody the same tensors: those are packed once.
            if id(message) not in packed:
                data = save(trees.unshared(message))
                packed[id(message)] = len(data) if message else 0, _packed(data), _order(message)
            down, record, names = packed[id(message)]
            node = self.roll.nodes.get(member.id)
            if node is None:
                ready[member.id] = Reply(member, None, "no Flower node speaks for it")
                continue
            settings = {"order": names, "ticket": list(ticket), **self._settings(member, phase, round)}
            contents[node] = RecordDict({"task": ConfigRecord(settings), "down": record})
        kind = "evaluate" if phase in self.method.scoring else "train"
        waiting = {self.roll.nodes[m.id]: m for m in order if m.id not in ready}
        wait_s = self.timeout_s + SLACK_S if self.timeout_s else math.inf
        answers = _answers(self.grid, kind, contents, wait_s, self.clock)
        for member in order:
            while member.id not in ready:
                node, answer = next(answers)
                sender = waiting[node]
                down = packed[id(messages[sender])][0]
                ready[sender.id] = replace(self._reply(sender, phase, ticket, answer), bytes_down=down)
                if not self.simulated:
                    self.on_step(ready[sender.id].steps)
            yield ready.pop(member.id)
        self._settle(phase, round)

    def _settings(self, member: Member, phase: str, round: int) -> dict[str, Any]:
        noted = self.ledger.get(member.id)
        accepted = noted["ticket"].tolist() if noted else list(AS_IT_IS if self.simulated else NEVER)
        return {"phase": phase, "round": round, "client": member.id, "accepted": accepted, **self._alike}

    def _reply(self, member: Member, phase: str, ticket: Ticket, answer: Message | None) -> Reply:
        if answer is None:
            return Reply(member, None, f"late: no answer in {self.timeout_s + SLACK_S:g} s")
        if answer.has_error():
            lines = (answer.error.reason or "no reason given").strip().splitlines()
            return Reply(member, None, f"Flower error {answer.error.code}: {lines[-1]}")
        try:
            return self._read(member, phase, ticket, answer.content)
        except BadUpdate as error:
            return Reply(member, None, str(error))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            return Reply(member, None, f"the reply is not one of fedfm: {error!r}")

    def _read(self, member: Member, phase: str, ticket: Ticket, content: Any) -> Reply:
        done = content["done"]
        status, reason, seconds, steps = done["status"], str(done["reason"]), float(done["seconds"]), int(done["steps"])
        if not (math.isfinite(seconds) and seconds >= 0 and steps >= 0):
            raise BadUpdate(f"it claims {steps} steps in {seconds} s")
        if status == "defect" and self.simulated:
            # Elsewhere a client is not believed: whoever claims a defect could end the run of all.
            raise ClientError(reason, client=member.id, round=ticket[0], phase=phase, job=done["job"] or None)
        if status != "done":
            return Reply(member, None, reason or "it failed", seconds=seconds)
        data = content["up"]["bytes"].data
        update = codec.decode(data, member.id)
        update = replace(update, tensors=_in_order(update.tensors, done["order"]))
        up = len(data) if update.tensors or update.metrics else 0
        reply = Reply(member, update, "", 0, up, seconds, steps)
        return replace(reply, accept=partial(self._accept, member, ticket)) if done["keeps"] else reply

    def _accept(self, member: Member, ticket: Ticket) -> None:
        self.ledger.put(member.id, ticket[0], {"ticket": torch.tensor(ticket)})
        self._admitted.append(member)

    def _settle(self, phase: str, round: int) -> None:
        """Tell those whose update was admitted. Who does not answer will read it in its next task."""
        contents = {
            self.roll.nodes[m.id]: RecordDict({"task": ConfigRecord(self._settings(m, phase, round))})
            for m in self._admitted
        }
        self._admitted = []
        for _ in _answers(self.grid, "query.settle", contents, SLACK_S, self.clock):
            pass


def over(grid: Grid, roll: Roll | None = None) -> type[FlowerLink]:
    """The link over a grid, as the class that ``Federation(..., link=...)`` takes."""

    class Over(FlowerLink):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, grid=grid, roll=roll, **kwargs)

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


@dataclass
class Node:
    """One client on its own machine.

    Args:
        member: who it is.
        worker: does its work, from the same recipe as the server's; its store belongs to this client and this run.
        pending: what waits for the server's word; a store in a folder of its own, or in memory.
        tidy: delete versions of the private state to which no server can go back.
    """

    member: Member
    worker: Worker
    pending: ClientStore = field(default_factory=ClientStore)
    tidy: bool = True

    def hello(self) -> RecordDict:
        """Who it is."""
        numbers: Any = {"examples": self.member.examples, **self.member.profile}
        return RecordDict({"who": ConfigRecord({"client": self.member.id}), "has": MetricRecord(numbers)})

    def settle(self, accepted: Ticket) -> None:
        """Store or forget what is pending, as the server says."""
        stored, waiting, kept = self._noted()
        if accepted == AS_IT_IS or (accepted == stored and waiting == NEVER):
            return
        if accepted == waiting:
            self.worker.accept(Done(self.member, kept=dict(kept)), accepted[0])
            if self.tidy:
                self.worker.store.commit(accepted[0] - 1)
        elif accepted > stored:
            raise StoreError(f"the private state that was accepted in round {accepted[0]} is not on this client")
        elif accepted < stored:
            self.worker.store.rewind(accepted[0])
        self._note(accepted)

    def task(self, content: Any) -> RecordDict:
        """Do what the server asks, and say how it went."""
        task = content["task"]
        scoring = task["phase"] in self.worker.method.scoring
        accepted: Any = tuple(task["accepted"])
        store = self.worker.store
        try:
            self._check(task)
            message = _in_order(load(content["down"]["bytes"].data), task["order"])
            if scoring and accepted == NEVER:
                # Such as the model before training: nothing private, but what there is must not be lost.
                self.worker.store = ClientStore()
            else:
                self.settle(accepted)
        except (RecipeError, StoreError, BadUpdate) as error:
            return _report(Done(self.member, reason=str(error)))
        try:
            done = self.worker.task(task["phase"], task["round"], self.member, message)
        except ClientError as error:
            return _report(Done(self.member, reason=error.reason), "defect", error.job or "")
        finally:
            self.worker.store = store
        if done.kept is not None and not scoring:
            self._note(self._noted()[0], task["ticket"], done.kept)
        return _report(done)

    def _noted(self) -> tuple[Ticket, Ticket, Tensors]:
        """The tickets of what is stored and of what is pending, and what is pending."""
        noted = dict(self.pending.get(self.member.id))
        if not noted:
            return NEVER, NEVER, {}
        stored, waiting = (tuple(noted.pop(name).tolist()) for name in ("stored", "waiting"))
        return stored, waiting, {name.removeprefix("kept/"): tensor for name, tensor in noted.items()}

    def _note(self, stored: Ticket, waiting: Sequence[int] = NEVER, kept: Tensors | None = None) -> None:
        tickets = {"stored": torch.tensor(stored), "waiting": torch.tensor(waiting)}
        self.pending.put(self.member.id, 0, tickets | {f"kept/{n}": t for n, t in (kept or {}).items()})

    def _check(self, task: Any) -> None:
        """See that the server means this client and runs the same recipe."""
        worker = self.worker
        own = {"client": self.member.id, **_alike(worker.method, worker.stages, worker.seed, worker.hide_metrics)}
        for name, value in own.items():
            if task[name] != value:
                raise RecipeError(f"its {name} is {value}, but the server's is {task[name]}")
        if task["phase"] not in (*worker.method.phases, *worker.method.scoring):
            raise RecipeError(f"{type(worker.method).__name__} has no task {task['phase']!r}")


def client_app(node: Callable[[Context], Node]) -> ClientApp:
    """A ClientApp that does the work of fedfm.

    Args:
        node: the client behind a context; called for every message, so it should hold on to what is costly.
    """
    app = ClientApp()

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        return Message(node(context).hello(), reply_to=message)

    @app.query("settle")
    def settle(message: Message, context: Context) -> Message:
        task: Any = message.content["task"]
        node(context).settle(tuple(task["accepted"]))
        return Message(RecordDict(), reply_to=message)

    @app.train()
    @app.evaluate()
    def task(message: Message, context: Context) -> Message:
        return Message(node(context).task(message.content), reply_to=message)

    return app


class MemoryGrid(Grid):
    """Nodes in this process. Messages go through Flower's own encoding; each runs when its reply is pulled.

    Args:
        app: what nodes run.
        members: one node for each; its ``node_config`` names the ``client``.
    """

    def __init__(self, app: ClientApp, members: Sequence[str]) -> None:
        self.app = app
        self.contexts = {
            number: Context(run_id=1, node_id=number, node_config={"client": id}, state=RecordDict(), run_config={})
            for number, id in enumerate(members, 1)
        }
        self._waiting: dict[str, Message] = {}
        self._run: Any = None

    def set_run(self, run: Any) -> None:
        self._run = run

    @property
    def run(self) -> Any:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        envelope = Envelope(
            run_id=1,
            message_id=str(uuid4()),
            src_node_id=0,
            dst_node_id=dst_node_id,
            reply_to_message_id="",
            group_id=group_id,
            created_at=time.time(),
            ttl=ttl or 3600.0,
            message_type=message_type,
        )
        return Message(content=content, metadata=envelope)  # type: ignore[call-overload]

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        pushed = {message.metadata.message_id: message for message in messages}
        self._waiting |= pushed
        return list(pushed)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = set(message_ids)
        for id in [id for id in self._waiting if id in wanted][:1]:
            message = self._waiting.pop(id)
            arrived = Message(content=_carried(message.content), metadata=message.metadata)  # type: ignore[call-overload]
            reply = self.app(arrived, self.contexts[message.metadata.dst_node_id])
            return [Message(content=_carried(reply.content), metadata=reply.metadata)]  # type: ignore[call-overload]
        return []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return [reply for id in self.push_messages(messages) for reply in self.pull_messages([id])]


class InMemoryFlower(FlowerLink):
    """Server and clients in this process, with Flower's messages between them. Takes what ``InProcess`` takes."""

    simulated: ClassVar[bool] = True

    def __init__(self, method: Method, trainer: Trainer, store: ClientStore, **settings: Any) -> None:
        worker = Worker(method, trainer, store, **settings)
        pending = ClientStore()

        def node(context: Context) -> Node:
            member = trainer.data.member(str(context.node_config["client"]))
            return Node(member, worker, pending, tidy=False)

        grid = MemoryGrid(client_app(node), list(trainer.data.ids))
        super().__init__(method, trainer, ClientStore(), grid=grid, **settings)


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


def _introduced(reply: Message | None) -> Member:
    """The member that a node says it is."""
    if reply is None or reply.has_error():
        raise BadUpdate(f"it does not say who it is: {reply and reply.error.reason}")
    try:
        who: Any = reply.content
        id, numbers = who["who"]["client"], dict(who["has"])
        examples = numbers.pop("examples")
        if not (isinstance(id, str) and id and isinstance(examples, int) and examples >= 0):
            raise BadUpdate(f"it calls itself {id!r} with {examples!r} examples")
        return Member(id, examples, {name: float(value) for name, value in numbers.items()})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadUpdate(f"it does not say who it is: {error!r}") from error


def _report(done: Done, status: str = "done", job: str = "") -> RecordDict:
    """What a client sends when its task is over."""
    settings: dict[str, Any] = {
        "status": "failed" if done.reason and status == "done" else status,
        "reason": done.reason,
        "job": job,
        "seconds": done.seconds,
        "steps": done.steps,
        "keeps": done.kept is not None,
        "order": [],
    }
    if done.update is None:
        return RecordDict({"done": ConfigRecord(settings)})
    settings["order"] = _order(done.update.tensors)
    return RecordDict({"done": ConfigRecord(settings), "up": _packed(codec.encode(done.update))})


def _alike(method: Method, stages: Sequence[Stage], seed: int, hide_metrics: bool) -> dict[str, str]:
    """What the recipes of server and client must have in common."""
    return {"method": repr(method), "stages": repr(tuple(stages)), "seed": f"{seed}", "hiding": f"{hide_metrics}"}


def _packed(data: bytes) -> ArrayRecord:
    return ArrayRecord({"bytes": Array("uint8", (len(data),), "fedfm", data)})


def _order(tensors: Tensors) -> list[int]:
    """The place of each name among the sorted names."""
    places = {name: place for place, name in enumerate(sorted(tensors))}
    return [places[name] for name in tensors]


def _in_order(tensors: Tensors, order: Sequence[int]) -> dict[str, torch.Tensor]:
    """The tensors in the order in which they were packed."""
    names = sorted(tensors)
    if sorted(order) != list(range(len(names))):
        raise BadUpdate("the order of its tensors is not one")
    return {names[place]: tensors[names[place]] for place in order}


def _carried(thing: Any) -> Any:
    """A record as it comes out at the other end: taken apart, and put together from the bytes."""
    children = {id: _carried(child) for id, child in (thing.children or {}).items()}
    return type(thing).inflate(thing.deflate(), children)
