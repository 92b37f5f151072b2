"""The client's half of a round in which uploads are judged on shares: beside what all do, one holds shares, and one
deals squares."""

from __future__ import annotations

import os

import numpy as np
import torch

from fedfm.core.update import Tensors
from fedfm.errors import BadUpdate
from fedfm.secure import masks
from fedfm.secure.agreement import KEY, NONCE, TAG, seal, unseal
from fedfm.secure.fixed_point import FixedPoint, Vector
from fedfm.secure.gather import LEAST
from fedfm.secure.letters import bytes_in, clients_in, numbers_in, of_bytes, table
from fedfm.secure.sharer import Sharer
from fedfm.secure.turn import Turn
from fedfm.secure.unit_point import projected

WORD = 8
"""Bytes of a number."""
DEALT = NONCE + KEY + WORD + TAG
"""Bytes of what gives the holder its part of a square, sealed for it."""
MODULUS = 2 ** (8 * WORD)


class Judge(Sharer):
    """A client in one round."""

    def __init__(self, round: int, code: FixedPoint, threshold: float) -> None:
        super().__init__(round, code, 1, threshold)
        self._turn = Turn("keys", "deal", "hold", "square", "meet", "lock", "check", "open")
        self._judged: list[int] = []

    def square(self, message: Tensors) -> dict[str, torch.Tensor]:
        """For each client a random vector in two parts, each given by a seed, and the two parts of its square."""
        self._turn("square")
        holder = bytes_in(message, "keys", 1, KEY).tobytes()
        key = self._agreed(holder, holder)
        count, length = numbers_in(message, "square")
        seeds, sealed, parts = [], [], []
        for _ in range(count):
            mine, theirs = os.urandom(KEY), os.urandom(KEY)
            both = drawn(length, mine)
            masks.add(both, theirs)
            part = os.urandom(WORD)
            rest = (dot(both, both) - int.from_bytes(part, "little")) % MODULUS
            seeds.append(mine)
            parts.append(part)
            sealed.append(seal(key, theirs + rest.to_bytes(WORD, "little")))
        return {
            **of_bytes("seeds", table(seeds, KEY)),
            **of_bytes("parts", table(parts, WORD)),
            **of_bytes("sealed", table(sealed, DEALT)),
        }

    def check(self, message: Tensors) -> dict[str, torch.Tensor]:
        """The holder's part of each survivor's square, of its product with a direction, and of its sums over subsets;
        and what it takes to open the difference of the vector and the random one."""
        self._turn("check", after="lock")
        survivors = clients_in(message, "survivors")
        [length] = numbers_in(message, "length")
        if any(place >= len(self._held) or self._held[place] is None for place in survivors):
            raise BadUpdate("the server asks for shares that it does not hold")
        theirs = numbers_of(bytes_in(message, "apart", len(survivors), length, WORD))
        direction = numbers_of(bytes_in(message, "direction", length, WORD))
        challenge = bytes_in(message, "challenge", KEY).tobytes()
        key = self._agreed(bytes_in(message, "keys", 1, KEY).tobytes(), self._pair.public)
        apart, squares, scores, sums = [], [], [], []
        for row, sealed in enumerate(bytes_in(message, "sealed", len(survivors), DEALT)):
            text = unseal(key, sealed.tobytes())
            share, random = self._share(survivors[row], length), drawn(length, text[:KEY])
            mine = share - random
            both = theirs[row] + mine
            apart.append(mine)
            squares.append((2 * dot(both, random) + int.from_bytes(text[KEY:], "little")) % MODULUS)
            scores.append(dot(share, direction))
            sums.append(projected(share[None], challenge)[0])
        self._judged = survivors
        return {
            **of_bytes("apart", bytes_of(np.stack(apart))),
            **of_bytes("squares", bytes_of(np.array(squares, np.uint64))),
            **of_bytes("scores", bytes_of(np.array(scores, np.uint64))),
            **of_bytes("sums", bytes_of(np.stack(sums))),
        }

    def open(self, message: Tensors) -> dict[str, torch.Tensor]:
        """The sum of the shares by how far each is trusted; once, and of no fewer than three clients."""
        self._turn("open", after="check")
        weights, length = numbers_in(message, "weights"), numbers_in(message, "length")
        if len(weights) != len(self._judged) or len(length) != 1 or max(weights) > self.code.max_weight:
            raise BadUpdate("the server's weights are not those of the clients who were judged")
        if (trusted := sum(weight > 0 for weight in weights)) < LEAST:
            raise BadUpdate(f"{trusted} clients are trusted, fewer than the {LEAST} whose sum may be seen")
        total = np.zeros(length[0], np.uint64)
        for place, weight in zip(self._judged, weights, strict=True):
            if weight:
                total += np.uint64(weight) * self._share(place, length[0])
        self._held = []
        return of_bytes("sum", bytes_of(total))

    def _share(self, place: int, length: int) -> Vector:
        """The holder's share of a client's vector."""
        return drawn(length, self._held[place] or b"")


def drawn(length: int, seed: bytes) -> Vector:
    """Uniform numbers of a seed, ``[length]``."""
    out = np.zeros(length, np.uint64)
    masks.add(out, seed)
    return out


def dot(one: Vector, other: Vector) -> int:
    """The product of two vectors, modulo $2^{64}$."""
    return int(np.dot(one, other))


def bytes_of(numbers: np.ndarray) -> np.ndarray:
    """Numbers of 64 bits as bytes: ``[..., 8]``."""
    return np.ascontiguousarray(numbers, "<u8").view(np.uint8).reshape(*numbers.shape, WORD)


def numbers_of(rows: np.ndarray) -> np.ndarray:
    """The numbers of 64 bits whose bytes these are."""
    return np.ascontiguousarray(rows).view("<u8")[..., 0]
