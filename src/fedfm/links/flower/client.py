"""The client's side: one client on its own machine, and the app in which it works."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from safetensors.torch import load

from fedfm.core.update import Member, Tensors
from fedfm.errors import BadUpdate, ClientError, RecipeError, StoreError
from fedfm.links.flower.records import AS_IT_IS, NEVER, Ticket, alike, in_order, order, packed
from fedfm.links.worker import Done, Worker
from fedfm.store.clients import ClientStore
from fedfm.wire import codec


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
            message = in_order(load(content["down"]["bytes"].data), task["order"])
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
        own = {"client": self.member.id, **alike(worker.method, worker.stages, worker.seed, worker.hide_metrics)}
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
    settings["order"] = order(done.update.tensors)
    return RecordDict({"done": ConfigRecord(settings), "up": packed(codec.encode(done.update))})
