"""Server and clients in one process, with Flower's own messages between them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar
from uuid import uuid4

from flwr.app import Context, Message, RecordDict
from flwr.app import Metadata as Envelope
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedfm.core.method import Method
from fedfm.links.flower.client import client_app
from fedfm.links.flower.server import FlowerLink
from fedfm.links.node import Node
from fedfm.links.worker import Worker
from fedfm.store.clients import ClientStore
from fedfm.train.trainer import Trainer


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


def _carried(thing: Any) -> Any:
    """A record as it comes out at the other end: taken apart, and put together from the bytes."""
    children = {id: _carried(child) for id, child in (thing.children or {}).items()}
    return type(thing).inflate(thing.deflate(), children)
