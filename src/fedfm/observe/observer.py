"""The contract of an observer: told what happens, never asked, never able to change it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Observer:
    """Base of all observers; each hook does nothing."""

    def planned(self, steps: float) -> None:
        """Several runs will follow each other; ``steps`` optimizer steps are expected in all of them together."""

    def started(self, name: str, rounds: int, done: int, steps: float) -> None:
        """A run begins.

        Args:
            name: id of the method.
            rounds: rounds of the whole run.
            done: rounds that a checkpoint already holds.
            steps: optimizer steps expected, over all clients and rounds still to come.
        """

    def stepped(self, steps: int) -> None:
        """Some optimizer steps were done."""

    def round_finished(self, record: Mapping[str, Any]) -> None:
        """A round is over; ``record`` is its line in ``metrics.jsonl``."""

    def finished(self, status: str) -> None:
        """The run is over: ``completed``, ``failed`` or ``stopped``."""
