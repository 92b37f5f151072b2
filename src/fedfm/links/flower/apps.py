"""The two apps of a deployed federation, which Flower starts by name.

The ClientApp is a messenger without torch or rows: it takes a message to the site process and brings back the answer.
The ServerApp runs the coordinator's recipe over the sites that are there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedfm.deploy import channel

client = ClientApp()
server = ServerApp()


def forwarded(message: Message, context: Context, kind: str) -> Message:
    """The site's answer to a message.

    Raises:
        StoreError: the site process is not there; Flower reports it to the server.
    """
    content: Any = message.content
    header = {
        "kind": kind,
        "settings": dict(content["task"]),
        "signature": content["seal"]["signature"].hex(),
    }
    body = content["down"]["bytes"].data if "down" in content else b""
    place = Path(str(context.node_config["site"])) / "site.sock"
    answer, up = channel.ask(place, header, body, float(header["settings"].get("patience_s", 0)))
    records: dict[str, Any] = {
        "done": ConfigRecord(answer["settings"]),
        "seal": ConfigRecord({"signature": bytes.fromhex(answer["signature"])}),
    }
    if answer.get("up"):
        records["up"] = ArrayRecord({"bytes": Array("uint8", (len(up),), "fedfm", up)})
    return Message(RecordDict(records), reply_to=message)


@client.query("hello")
def _hello(message: Message, context: Context) -> Message:
    return forwarded(message, context, "hello")


@client.query("settle")
def _settle(message: Message, context: Context) -> Message:
    return forwarded(message, context, "settle")


@client.query("put")
def _put(message: Message, context: Context) -> Message:
    return forwarded(message, context, "put")


@client.query("part")
def _part(message: Message, context: Context) -> Message:
    return forwarded(message, context, "part")


@client.train()
def _train(message: Message, context: Context) -> Message:
    return forwarded(message, context, "task")


@client.evaluate()
def _evaluate(message: Message, context: Context) -> Message:
    return forwarded(message, context, "task")


@server.main()
def _main(grid: Grid, context: Context) -> None:
    from fedfm.deploy.coordinator import Coordinator
    from fedfm.links.flower.roll import Roll
    from fedfm.links.flower.server import Delivery, over

    coordinator = Coordinator(Path(str(context.run_config["coordinator"])))
    resume = bool(context.run_config["resume"])
    coordinator.begin(resume)
    with coordinator.reporting():
        guard = coordinator.guard()
        roll = Roll(grid, guard, tell=coordinator.tell)
        roll.wait(coordinator.least, coordinator.settings.patience_s)
        coordinator.run(roll, over(grid, roll, guard, Delivery(**coordinator.delivery)), resume)
