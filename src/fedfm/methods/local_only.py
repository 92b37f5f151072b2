"""Local training, the lower reference of the surveys: every client trains alone and nothing travels.

A client takes as many local steps in all as it takes in the federated run of the same plan, round by round, each round
with a fresh optimizer, as there. So the two differ in nothing but the exchange.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from fedfm.core import trees
from fedfm.core.method import Client, Method, Paper, Work
from fedfm.core.traits import Trait, Traits
from fedfm.core.update import Tensors


@dataclass(frozen=True)
class LocalOnly(Method):
    """$w_k$ is trained on the data of client $k$ alone."""

    paper: ClassVar[Paper | None] = Paper(title="Local training (reference)", authors="", year=2017, venue="baseline")
    share: ClassVar[trees.Patterns] = ()
    traits: ClassVar[Traits] = Method.traits - {Trait.FORGETFUL, Trait.GLOBAL}

    def local(self, client: Client, message: Tensors) -> Work:
        """The default client work, of which not even a metric leaves the client."""
        update = yield from super().local(client, message)
        return replace(update, metrics={})
