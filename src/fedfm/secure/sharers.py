"""The clients of one process who split their uploads into shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedfm.core.update import Tensors, Update
from fedfm.secure.letters import DEAL, HOLD, KEYS
from fedfm.secure.parties import Parties, letter
from fedfm.secure.sharer import Sharer

if TYPE_CHECKING:
    from fedfm.secure.securefl import SecureFL
    from fedfm.secure.smpc_additive import SMPCAdditive
    from fedfm.wire.stage import Stage


class Sharers(Parties[Sharer]):
    """They keep the seeds of their own shares, and holders those of all.

    Args:
        secure: the protocol.
        stages: what uploads went through before.
    """

    def __init__(self, secure: SMPCAdditive | SecureFL, stages: Sequence[Stage] = ()) -> None:
        super().__init__()
        self.secure = secure
        self.code = secure.code(stages)

    def answer(self, phase: str, round: int, client: str, message: Tensors, found: Update | None = None) -> Update:
        if phase == KEYS:
            self.begin(client, Sharer(round, self.code, self.secure.holders, self.secure.threshold))
            return letter(self.halves[client].keys(), client)
        half = self.half(round, client)
        does = {DEAL: half.deal, HOLD: half.hold}.get(phase, half.open)
        return letter(does(message), client)

    def meet(self, round: int, client: str, message: Tensors) -> Tensors:
        return self.half(round, client).meet(message)

    def mask(self, round: int, update: Update, draw: np.random.Generator) -> Update:
        half = self.half(round, update.member)
        vector = self.code.encode(update, self.code.ring(half.clients))
        self.code.blur(vector, half.clients, draw)
        return letter(half.lock(vector), update.member)
