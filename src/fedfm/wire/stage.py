"""The contract of a stage: something done to every upload, half on the client and half on the server."""

from __future__ import annotations

import torch

from fedfm.core.traits import Part
from fedfm.core.update import Update


class Stage(Part):
    """A step of the upload's way. Subclasses are frozen dataclasses and override one half or both.

    Stages run in the order of the recipe on the client, and in the opposite order on the server.
    """

    def send(self, update: Update, draw: torch.Generator) -> Update:
        """What leaves the client instead of ``update``; ``draw`` is seeded for this client, round and stage."""
        return update

    def receive(self, update: Update) -> Update:
        """What the server works with instead of what arrived."""
        return update
