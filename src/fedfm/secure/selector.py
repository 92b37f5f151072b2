"""The client's half of a round of which some coordinates are encrypted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from fedfm.core import trees
from fedfm.core.update import Tensors, Update
from fedfm.errors import BadUpdate
from fedfm.secure.fixed_point import BESIDE, FixedPoint, Ring
from fedfm.secure.holder import Holder
from fedfm.secure.holders import Holders
from fedfm.secure.letters import CHOOSE, KEYS, MAP, MARK, bytes_in, of_bytes, of_numbers, of_texts
from fedfm.secure.parties import letter

if TYPE_CHECKING:
    from fedfm.secure.fedml_he import FedMLHE
    from fedfm.wire.stage import Stage

Mask = NDArray[np.uint8]
"""Which coordinates are encrypted, a bit each: ``[(d + 7) // 8]``."""


def share(ratio: float, values: int) -> int:
    """How many of so many values are encrypted: the part, rounded up."""
    return min(values, int(np.ceil(ratio * values)))


def top(numbers: NDArray[np.int64], count: int) -> Mask:
    """The mask of the largest numbers ``[d]``; of equal ones, those that come first."""
    chosen = np.zeros(len(numbers), bool)
    chosen[np.argsort(-numbers, kind="stable")[:count]] = True
    return np.packbits(chosen)


def inside(mask: Mask, values: int, count: int) -> NDArray[np.bool_]:
    """Which of so many coordinates a mask means, ``[d]``.

    Raises:
        BadUpdate: it is no mask of so many coordinates, or means another number of them.
    """
    bits = np.unpackbits(mask)
    if len(mask) != -(-values // 8) or int(bits.sum()) != count or bits[values:].any():
        raise BadUpdate(f"the mask does not mean {count} of {values} coordinates")
    return bits[:values].astype(bool)


def digest(mask: Mask | None) -> bytes:
    """By which a mask is known; zeros for none."""
    return bytes(32) if mask is None else sha256(mask.tobytes()).digest()


def plain_ring(code: FixedPoint) -> Ring:
    """In which the coordinates travel that are not encrypted, each by itself and not multiplied by the weight."""
    return Ring(-(-code.bits // 8))


class Selector(Holder):
    """A client in one round.

    Args:
        round: number of the round.
        code: how values become integers.
        ratio: the part of the coordinates that is encrypted.
        mask: which, if that is known.
    """

    def __init__(self, round: int, code: FixedPoint, ratio: float, mask: Mask | None) -> None:
        super().__init__(round, code)
        self.ratio = ratio
        self.mask = mask

    def keys(self) -> dict[str, torch.Tensor]:
        knows = np.frombuffer(digest(self.mask), np.uint8)[None].copy()
        return super().keys() | of_bytes("knows", knows)

    def map(self, message: Tensors, found: Update) -> dict[str, torch.Tensor]:
        """How sensitive each coordinate is, encrypted."""
        self._turn("map")
        self.receive(message)
        most = self.code.max_value
        scaled = {name: tensor * most for name, tensor in found.tensors.items()}
        vector = self._vector(replace(found, tensors=scaled, weight=min(found.weight, self.code.max_weight)))
        self._length = len(vector)
        return of_texts("cipher", self.secret.encrypt(vector))

    def choose(self, message: Tensors) -> dict[str, torch.Tensor]:
        """The mask of the most sensitive coordinates; how sensitive they are is not said."""
        self._turn("choose", after="map")
        total = self._opened(message, self._length)[:-BESIDE]
        return of_bytes("mask", top(total, share(self.ratio, len(total))))

    def meet(self, message: Tensors) -> dict[str, torch.Tensor]:
        if MARK + "mask" in message:
            self.mask = bytes_in(message, "mask", -1)
        return super().meet(message)

    def lock(self, update: Update) -> dict[str, torch.Tensor]:
        """Some coordinates encrypted and multiplied by the weight, and it; the others, and it, as they are."""
        if self.mask is None:
            raise BadUpdate("it does not know which coordinates to encrypt: the server sent no mask")
        values = trees.count(update.tensors)
        chosen = inside(self.mask, values, share(self.ratio, values))
        vector = self._vector(update)
        sent = self.locked(np.concatenate([vector[:-BESIDE][chosen], vector[-BESIDE:]]))
        if chosen.all():
            return sent
        ring = plain_ring(self.code)
        rest = vector[:-BESIDE][~chosen] // int(update.weight)
        return sent | of_bytes("plain", ring.pack(rest.astype(ring.dtype))) | of_numbers("weight", [int(update.weight)])


class Selectors(Holders):
    """They keep the key of the round, and the mask from round to round.

    Args:
        secure: the protocol.
        stages: what uploads went through before.
    """

    def __init__(self, secure: FedMLHE, stages: Sequence[Stage] = ()) -> None:
        super().__init__(secure, stages)
        self.ratio = secure.ratio
        self.masks: dict[str, Mask] = {}

    def answer(self, phase: str, round: int, client: str, message: Tensors, found: Update | None = None) -> Update:
        if phase == KEYS:
            made = Selector(round, self.code, self.ratio, self.masks.get(client))
            self.begin(client, made)
            return letter(made.keys(), client)
        if phase not in (MAP, CHOOSE):
            return super().answer(phase, round, client, message, found)
        half = self._selector(round, client)
        if phase == CHOOSE:
            return letter(half.choose(message), client)
        if found is None:
            raise BadUpdate("it has not looked at its rows, and cannot say what is sensitive")
        return letter(half.map(message, found), client)

    def mask(self, round: int, update: Update, draw: np.random.Generator) -> Update:
        sent = super().mask(round, update, draw)
        if (mask := self._selector(round, update.member).mask) is not None:
            self.masks[update.member] = mask
        return sent

    def _selector(self, round: int, client: str) -> Selector:
        half = self.half(round, client)
        assert isinstance(half, Selector)
        return half
