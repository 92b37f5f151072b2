"""The steps of a client in a round of a protocol: each is done once at most, in their order."""

from __future__ import annotations

from fedfm.errors import BadUpdate


class Turn:
    """Whose step is next.

    Args:
        steps: in their order; some may be left out.
    """

    def __init__(self, *steps: str) -> None:
        self.steps = steps
        self._done = -1

    def __call__(self, step: str, after: str = "") -> None:
        """Do a step.

        Args:
            step: which.
            after: the one that must have been done directly before; any unless given.

        Raises:
            BadUpdate: it is out of turn.
        """
        place, before = self.steps.index(step), self.steps[self._done] if self._done >= 0 else "nothing"
        if place <= self._done or (after and before != after):
            raise BadUpdate(f"it was asked for {step!r} after {before!r}: each step of a round is done once, in order")
        self._done = place
