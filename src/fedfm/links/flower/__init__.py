"""The Flower link: the same method as a Flower ServerApp and ClientApp. Nothing else imports ``flwr``.

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

from fedfm.links.flower.client import Node, client_app
from fedfm.links.flower.memory import InMemoryFlower, MemoryGrid
from fedfm.links.flower.server import FlowerLink, Roll, over, server_app

__all__ = ["FlowerLink", "InMemoryFlower", "MemoryGrid", "Node", "Roll", "client_app", "over", "server_app"]
