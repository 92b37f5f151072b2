"""The clients of one process whose uploads are judged on shares."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedfm.core.update import Tensors, Update
from fedfm.secure.judge import Judge
from fedfm.secure.letters import CHECK, KEYS, SQUARE
from fedfm.secure.parties import letter
from fedfm.secure.sharers import Sharers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fedfm.secure.securefl import SecureFL
    from fedfm.wire.stage import Stage


class Judges(Sharers):
    """They keep the seeds of their own shares, and the holder those of all.

    Args:
        secure: the protocol.
        stages: what uploads went through before.
    """

    def __init__(self, secure: SecureFL, stages: Sequence[Stage] = ()) -> None:
        super().__init__(secure, stages)
        self.threshold = secure.threshold

    def answer(self, phase: str, round: int, client: str, message: Tensors, found: Update | None = None) -> Update:
        if phase == KEYS:
            self.begin(client, Judge(round, self.code, self.threshold))
        half = self.half(round, client)
        if isinstance(half, Judge) and phase in (SQUARE, CHECK):
            return letter(half.square(message) if phase == SQUARE else half.check(message), client)
        if phase == KEYS:
            return letter(half.keys(), client)
        return super().answer(phase, round, client, message, found)
