"""The client's half of a round whose uploads are encrypted: each step done once at most, in their order.

What it keeps is secret and in memory alone. A site that was restarted in between has lost it and drops out.
"""

from __future__ import annotations

import os

import numpy as np
import torch
from numpy.typing import NDArray

from fedfm.core.update import Tensors, Update
from fedfm.errors import BadUpdate
from fedfm.secure.agreement import KEY, NONCE, TAG, KeyPair, seal, unseal
from fedfm.secure.cipher import EXACT, Parameters, Secret
from fedfm.secure.fixed_point import FixedPoint, Ring
from fedfm.secure.gather import LEAST
from fedfm.secure.letters import MARK, bytes_in, flat, numbers_in, of_bytes, of_texts, table, texts_in
from fedfm.secure.turn import Turn

SEALED = NONCE + KEY + TAG
"""Bytes of what opens the key of the round, sealed for one client."""
STEPS = ("keys", "deal", "map", "choose", "meet", "lock", "open")
"""In this order; those in between may be left out, but nothing is opened to which the client did not add."""


class Holder:
    """A client in one round.

    Args:
        round: number of the round.
        code: how values become integers.
    """

    def __init__(self, round: int, code: FixedPoint) -> None:
        self.round = round
        self.code = code
        self._turn = Turn(*STEPS)
        self._pair = KeyPair()
        self._clients = 0
        self._key: tuple[bytes, NDArray[np.uint8]] | None = None

    def keys(self) -> dict[str, torch.Tensor]:
        """A public key to be written to.

        Raises:
            BadUpdate: asked out of turn. So do the other steps, and when the server's message is none that they know.
        """
        self._turn("keys")
        return of_bytes("keys", table([self._pair.public], KEY))

    def deal(self, message: Tensors) -> dict[str, torch.Tensor]:
        """A key of the round, sealed under another; and that one sealed for each client."""
        self._turn("deal")
        keys = self._met(message)
        opener = os.urandom(KEY)
        sealed = [self._sealed(key, opener) for key in keys]
        self._key = opener, flat(seal(opener, Secret(self.parameters).text()))
        return of_bytes("secret", self._key[1]) | of_bytes("sealed", table(sealed, SEALED))

    def meet(self, message: Tensors) -> dict[str, torch.Tensor]:
        """Have the key of the round; what is left of the message is for the method."""
        self._turn("meet")
        self.receive(message)
        return {name: tensor for name, tensor in message.items() if not name.startswith(MARK)}

    def receive(self, message: Tensors) -> None:
        """Have the key of the round, unless it is there."""
        if self._key is not None:
            return
        keys = self._met(message)
        dealers = numbers_in(message, "dealer")
        if len(dealers) != 1 or dealers[0] >= len(keys):
            raise BadUpdate("the server does not say who dealt the key of the round")
        row = bytes_in(message, "sealed", len(keys), SEALED)[keys.index(self._pair.public)]
        opener = unseal(self._agreed(keys[dealers[0]]), row.tobytes())
        secret = bytes_in(message, "secret", -1)
        unseal(opener, secret.tobytes())  # So that what was changed is seen before the training.
        self._key = opener, secret

    def lock(self, update: Update) -> dict[str, torch.Tensor]:
        """The update as integers, all of them encrypted, and its weight."""
        return self.locked(self._vector(update))

    def locked(self, vector: NDArray[np.int64]) -> dict[str, torch.Tensor]:
        """A vector ``[d]``, encrypted."""
        self._turn("lock")
        self._length = len(vector)
        return of_texts("cipher", self.secret.encrypt(vector))

    def open(self, message: Tensors) -> dict[str, torch.Tensor]:
        """The sum of the vectors in the clear."""
        self._turn("open", after="lock")
        return of_bytes("sum", self.ring.pack(self._opened(message, self._length).astype(self.ring.dtype)))

    @property
    def secret(self) -> Secret:
        """The key of the round, ready for use; what is kept of it between the steps is far smaller."""
        if self._key is None:
            raise BadUpdate("it has no key of the round")
        opener, sealed = self._key
        return Secret(self.parameters, unseal(opener, sealed.tobytes()))

    @property
    def clients(self) -> int:
        """How many have the key of the round."""
        if not self._clients:
            raise BadUpdate("it has no key of the round")
        return self._clients

    @property
    def ring(self) -> Ring:
        """In which the sum travels."""
        return self.code.ring(self.clients)

    @property
    def parameters(self) -> Parameters:
        """Of the encryption."""
        return Parameters.of(self.code.largest(self.clients), self.clients)

    def _opened(self, message: Tensors, length: int) -> NDArray[np.int64]:
        own = self.parameters
        return self.secret.decrypt(texts_in(message, "cipher", len(own.lengths(length)), own.most), length)

    def _vector(self, update: Update) -> NDArray[np.int64]:
        return self.ring.signed(self.code.encode(update, self.ring))

    def _met(self, message: Tensors) -> list[bytes]:
        """The public keys of all clients of the round."""
        keys = [row.tobytes() for row in bytes_in(message, "keys", -1, KEY)]
        if len(set(keys)) != len(keys) or self._pair.public not in keys:
            raise BadUpdate("the server's list of keys leaves this client's out, or has one of them twice")
        if len(keys) < LEAST or self.code.largest(len(keys)).bit_length() > EXACT:
            raise BadUpdate(f"the server names {len(keys)} clients, fewer than {LEAST} or more than can be summed")
        self._clients = len(keys)
        return keys

    def _sealed(self, public: bytes, text: bytes) -> bytes:
        """A text sealed for a client; for one whose key is none, nothing, so that it alone drops out."""
        try:
            return seal(self._agreed(public), text)
        except BadUpdate:
            return bytes(SEALED)

    def _agreed(self, public: bytes) -> bytes:
        return self._pair.agreed(public, "key of a round", self.round)
