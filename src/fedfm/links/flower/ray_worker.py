"""What a Ray worker does: shares of the clients' work, on a model and rows that stay in its memory.

=============  ===========  =========================================================================
record         entry        content
=============  ===========  =========================================================================
``task``       settings     method, phase, round, clients, which message each receives
``done``       settings     reasons, seconds, steps, memory of the clients; or ``failed``: what ends the run
``orders``     settings     the order that tensors had, by record
``down.N``     ``bytes``    a message, for one client of the share or for several
``own.N``      ``bytes``    private state of the client in this place; ``kept.N`` when it is new
``up.N``       ``bytes``    its update as :mod:`fedfm.wire.codec` wrote it
=============  ===========  =========================================================================
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from safetensors.torch import load, save

from fedfm.core import trees
from fedfm.core.update import Tensors, Update
from fedfm.errors import ClientError, FedfmError, Stopped
from fedfm.links.flower.client import packed
from fedfm.links.tickets import in_order, order
from fedfm.links.worker import Worker
from fedfm.store.clients import ClientStore
from fedfm.wire import codec

if TYPE_CHECKING:
    from fedfm.federation import Federation

Build = Callable[[], Mapping[str, "Federation"]]
"""Makes federations, by the id of their method. It travels with each share; those that are equal are called once."""

BELL = "fedfm"
"""Name of the Ray actor that lives as long as the simulation."""
GRACE_S = 5.0
"""Seconds after its end in which a worker may stop between two steps."""


def client_app(build: Build, threads: int) -> ClientApp:
    """The app of Ray workers.

    Args:
        build: makes the federations when a worker does its first share.
        threads: of torch, in each worker.
    """
    app = ClientApp()

    @app.train()
    def share(message: Message, context: Context) -> Message:
        _listen()
        return Message(answer(build, threads, message.content), reply_to=message)

    return app


def bell() -> Any:
    """A Ray actor whose end tells the workers that they are not needed any more. Made by the server."""
    import ray

    class Bell:
        async def rings(self) -> None:
            await asyncio.Event().wait()

    return ray.remote(num_cpus=0)(Bell).options(name=BELL).remote()


_over = threading.Event()
"""Set when the simulation is over and this worker still at work."""


@cache
def _listen() -> None:
    """Hear the bell: Flower and Ray let a worker finish what it is doing, and that may be long."""

    def wait() -> None:
        import ray

        try:
            ray.get(ray.get_actor(BELL).rings.remote())
        finally:
            _over.set()
            time.sleep(GRACE_S)
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _pulse(steps: int) -> None:
    if _over.is_set():
        raise Stopped("the simulation is over")


def answer(build: Build, threads: int, content: Any) -> RecordDict:
    """The reply to a share. An error travels, too: it is the server that raises it."""
    try:
        return _work(_federations(build, threads), content)
    except ClientError as error:
        failed = {"reason": error.reason, "client": error.client, "job": error.job or ""}
    except FedfmError as error:
        failed = {"reason": str(error), "error": type(error).__name__}
    except Exception:
        failed = {"reason": traceback.format_exc(), "error": ""}
    return records({"failed": failed})


@cache
def _federations(build: Build, threads: int) -> Mapping[str, Federation]:
    torch.set_num_threads(threads)
    return build()


def _work(federations: Mapping[str, Federation], content: Any) -> RecordDict:
    task = content["task"]
    federation = federations[task["method"]]
    trainer = federation.judge if task["judge"] else federation.trainer
    store, messages = ClientStore(), {}
    for place, (id, down) in enumerate(zip(task["clients"], task["down"], strict=True)):
        messages[trainer.data.member(id)] = tensors_of(content, f"down.{down}")
        if (own := f"own.{place}") in content:
            store.put(id, 0, tensors_of(content, own))
    # What is for secure aggregation is done by the server's process, which has clients' secrets.
    worker = Worker(federation.method, trainer, store, **{**federation.shared, "secure": None}, on_step=_pulse)
    done = list(worker.tasks(task["phase"], task["round"], messages))
    told = {
        "reasons": [one.reason for one in done],
        "seconds": [one.seconds for one in done],
        "steps": [one.steps for one in done],
        "memory": [one.memory for one in done],
    }
    kept = {f"kept.{place}": one.kept for place, one in enumerate(done) if one.kept is not None}
    updates = {f"up.{place}": one.update for place, one in enumerate(done) if one.update is not None}
    return records({"done": told}, kept, updates)


def records(
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensors] | None = None,
    updates: Mapping[str, Update] | None = None,
) -> RecordDict:
    """Settings, tensors and updates as they travel, by the name of their record."""
    tensors, updates = tensors or {}, updates or {}
    orders = {name: order(these) for name, these in tensors.items()}
    orders |= {name: order(update.tensors) for name, update in updates.items()}
    records: dict[str, Any] = {name: ConfigRecord(values) for name, values in {**settings, "orders": orders}.items()}
    records |= {name: packed(save(trees.unshared(these))) for name, these in tensors.items()}
    return RecordDict(records | {name: packed(codec.encode(update)) for name, update in updates.items()})


def tensors_of(content: Any, name: str) -> dict[str, torch.Tensor]:
    """The tensors in a record, in their order."""
    return in_order(load(content[name]["bytes"].data), content["orders"][name])
