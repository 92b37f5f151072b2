"""The client's side of Flower: an app that hands messages to a node and sends back what it says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedfm.links.node import Node
from fedfm.links.tickets import ticket


def packed(data: bytes) -> ArrayRecord:
    """Bytes that Flower carries without looking in."""
    return ArrayRecord({"bytes": Array("uint8", (len(data),), "fedfm", data)})


def report(settings: dict[str, Any], up: bytes | None) -> RecordDict:
    """What a client sends when its task is over."""
    records: dict[str, Any] = {"done": ConfigRecord(settings)}
    return RecordDict(records | ({"up": packed(up)} if up is not None else {}))


def client_app(node: Callable[[Context], Node]) -> ClientApp:
    """A ClientApp that does the work of fedfm.

    Args:
        node: the client behind a context; called for every message, so it should hold on to what is costly.
    """
    app = ClientApp()

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        who = node(context).member
        return Message(report({"client": who.id, "examples": who.examples, **who.profile}, None), reply_to=message)

    @app.query("settle")
    def settle(message: Message, context: Context) -> Message:
        task: Any = message.content["task"]
        node(context).settle(ticket(task["accepted"]))
        return Message(RecordDict(), reply_to=message)

    @app.train()
    @app.evaluate()
    def task(message: Message, context: Context) -> Message:
        content: Any = message.content
        done = node(context).task(dict(content["task"]), content["down"]["bytes"].data)
        return Message(report(*done), reply_to=message)

    return app
