"""The synchronous schedule: a round ends when everyone asked has answered or has been dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedfm.core.method import Method, Server, State
from fedfm.core.traits import Part


@dataclass(frozen=True)
class Synchronous(Part):
    """One round after the other, as the method writes it."""

    id: ClassVar[str] = "synchronous"

    def advance(self, method: Method, server: Server, state: State) -> State:
        """The state after one more round."""
        return method.round(server, state)
