"""The synchronous schedule: a round ends when everyone asked has answered or has been dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedfm.core.method import Method, State
from fedfm.schedule.schedule import Memory, Schedule

if TYPE_CHECKING:
    from fedfm.server import RoundServer


@dataclass(frozen=True)
class Synchronous(Schedule):
    """One round after the other, as the method writes it."""

    id: ClassVar[str] = "synchronous"

    def advance(self, method: Method, server: RoundServer, state: State, memory: Memory) -> tuple[State, Memory]:
        return method.round(server, state), memory
