"""The Flower link: the same method as a Flower ServerApp and ClientApp. Nothing else imports ``flwr``.

A task is one Flower message to the node that speaks for a client, its answer one reply:

=========  ==========  ========================================================================================
record     entry       content
=========  ==========  ========================================================================================
``task``   settings    phase, round, client, tickets, settings that both sides must have alike
``seal``   settings    a signature over all of this, where server and clients need one (:mod:`fedfm.deploy.seal`)
``down``   ``bytes``   the message as safetensors
``done``   settings    status, reason, seconds, steps
``up``     ``bytes``   the update as :mod:`fedfm.wire.codec` wrote it
=========  ==========  ========================================================================================

Bytes travel in a Flower ``Array`` with ``dtype="uint8"`` and ``stype="fedfm"``: Flower carries them without looking in,
so bfloat16 and float8 survive. safetensors sorts by name; the order that the tensors had travels beside them, because a
norm adds up in that order, and runs are to be equal to the bit.

Private state and tickets are those of :mod:`fedfm.links.node`. At the end of a question, a message without a task says
what was admitted, so that nothing is pending when the run ends; who misses it is told by its next task.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedfm.links.flower.client import client_app
    from fedfm.links.flower.memory import InMemoryFlower, MemoryGrid
    from fedfm.links.flower.roll import Roll
    from fedfm.links.flower.server import FlowerLink, over, server_app
    from fedfm.links.node import Node

# Flower reports who uses it, unless told not to before it is first loaded.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

# Loaded when first used: the app in which a site's messages arrive starts for each of them, and needs no torch.
_HOMES = {
    "FlowerLink": "fedfm.links.flower.server",
    "InMemoryFlower": "fedfm.links.flower.memory",
    "MemoryGrid": "fedfm.links.flower.memory",
    "Node": "fedfm.links.node",
    "Roll": "fedfm.links.flower.roll",
    "client_app": "fedfm.links.flower.client",
    "over": "fedfm.links.flower.server",
    "server_app": "fedfm.links.flower.server",
}

__all__ = ["FlowerLink", "InMemoryFlower", "MemoryGrid", "Node", "Roll", "client_app", "over", "server_app"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
