"""The client's half of a round whose uploads are split into shares: each step done once at most, in their order.

What it keeps is secret and in memory alone. A site that was restarted in between has lost it and drops out.
"""

from __future__ import annotations

import os

import numpy as np
import torch

from fedfm.core.update import Tensors
from fedfm.errors import BadUpdate
from fedfm.secure import masks
from fedfm.secure.agreement import KEY, NONCE, TAG, KeyPair, seal, unseal
from fedfm.secure.fixed_point import FixedPoint, Vector, above
from fedfm.secure.gather import LEAST
from fedfm.secure.letters import MARK, bytes_in, clients_in, numbers_in, of_bytes, table
from fedfm.secure.turn import Turn

SEALED = NONCE + KEY + TAG
"""Bytes of what gives a holder its share, sealed for it."""
CANNOT, CAN = 0, 1
"""Whether a holder could open what was sealed for it."""


class Sharer:
    """A client in one round; some hold shares of all.

    Args:
        round: number of the round.
        code: how values become integers.
        holders: clients who hold shares.
        threshold: part of the clients of the round of whom more must be in a sum.
    """

    def __init__(self, round: int, code: FixedPoint, holders: int, threshold: float) -> None:
        self.round = round
        self.code = code
        self.holders = holders
        self.threshold = threshold
        self.clients = 0
        self._turn = Turn("keys", "deal", "hold", "meet", "lock", "open")
        self._pair = KeyPair()
        self._seeds: list[bytes] = []
        self._held: list[bytes | None] = []

    def keys(self) -> dict[str, torch.Tensor]:
        """A public key to be written to.

        Raises:
            BadUpdate: asked out of turn. So do the other steps, and when the server's message is none that they know.
        """
        self._turn("keys")
        return of_bytes("keys", table([self._pair.public], KEY))

    def deal(self, message: Tensors) -> dict[str, torch.Tensor]:
        """A seed for each holder, sealed for it: of its share of the vector, which is not known yet."""
        self._turn("deal")
        keys = [row.tobytes() for row in bytes_in(message, "keys", self.holders, KEY)]
        clients = numbers_in(message, "clients")
        if len(set(keys)) != len(keys):
            raise BadUpdate("the server names one holder twice")
        if len(clients) != 1 or clients[0] < max(LEAST, self.holders):
            raise BadUpdate(f"the server says that {clients} clients are in the round, fewer than can be summed")
        [self.clients] = clients
        self._seeds = [os.urandom(KEY) for _ in keys]
        sealed = [seal(self._agreed(key, key), seed) for key, seed in zip(keys, self._seeds, strict=True)]
        return of_bytes("sealed", table(sealed, SEALED))

    def hold(self, message: Tensors) -> dict[str, torch.Tensor]:
        """Take the shares of all, of those that can be opened."""
        self._turn("hold", after="deal")
        keys = bytes_in(message, "keys", -1, KEY)
        for key, sealed in zip(keys, bytes_in(message, "sealed", len(keys), SEALED), strict=True):
            try:
                self._held.append(unseal(self._agreed(key.tobytes(), self._pair.public), sealed.tobytes()))
            except BadUpdate:
                self._held.append(None)
        opened = [[CANNOT if seed is None else CAN] for seed in self._held]
        return of_bytes("opened", np.array(opened, np.uint8).reshape(-1, 1))

    def meet(self, message: Tensors) -> dict[str, torch.Tensor]:
        """What of a message is for the method."""
        self._turn("meet")
        if not self._seeds:
            raise BadUpdate("it has dealt no shares of its upload")
        return {name: tensor for name, tensor in message.items() if not name.startswith(MARK)}

    def lock(self, vector: Vector) -> dict[str, torch.Tensor]:
        """The server's share: the vector, which is overwritten, without the shares of the holders."""
        self._turn("lock", after="meet")
        for seed in self._seeds:
            masks.add(vector, seed, -1)
        self._seeds = []
        return of_bytes("share", self.code.ring(self.clients).pack(vector))

    def open(self, message: Tensors) -> dict[str, torch.Tensor]:
        """The sum of the survivors' shares; once, and of no sum over few."""
        self._turn("open")
        survivors, length = clients_in(message, "survivors"), numbers_in(message, "length")
        needed = max(LEAST, above(self.threshold, self.clients))
        if len(survivors) < needed:
            raise BadUpdate(f"{len(survivors)} clients survived, fewer than the {needed} whose sum may be seen")
        seeds = [self._held[place] if place < len(self._held) else None for place in survivors]
        if len(length) != 1 or None in seeds:
            raise BadUpdate("the server asks for shares that it does not hold")
        ring = self.code.ring(self.clients)
        total = ring.zeros(length[0])
        for seed in seeds:
            masks.add(total, seed or b"")
        self._held = []
        return of_bytes("sum", ring.pack(total))

    def _agreed(self, public: bytes, holder: bytes) -> bytes:
        # By whom it is for, as two holders write to each other, too.
        return self._pair.agreed(public, f"share for {holder.hex()}", self.round)
