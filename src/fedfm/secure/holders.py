"""The clients of one process who encrypt their uploads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedfm.core.update import Tensors, Update
from fedfm.secure.holder import Holder
from fedfm.secure.letters import DEAL, KEYS
from fedfm.secure.parties import Parties, letter

if TYPE_CHECKING:
    from fedfm.secure.ckks import CKKS
    from fedfm.wire.stage import Stage


class Holders(Parties[Holder]):
    """They keep the key of the round.

    Args:
        secure: the protocol.
        stages: what uploads went through before.
    """

    def __init__(self, secure: CKKS, stages: Sequence[Stage] = ()) -> None:
        super().__init__()
        self.code = secure.code(stages)

    def answer(self, phase: str, round: int, client: str, message: Tensors, found: Update | None = None) -> Update:
        if phase == KEYS:
            self.begin(client, Holder(round, self.code))
            return letter(self.halves[client].keys(), client)
        holder = self.half(round, client)
        return letter(holder.deal(message) if phase == DEAL else holder.open(message), client)

    def meet(self, round: int, client: str, message: Tensors) -> Tensors:
        return self.half(round, client).meet(message)

    def mask(self, round: int, update: Update, draw: np.random.Generator) -> Update:
        return letter(self.half(round, update.member).lock(update), update.member)
