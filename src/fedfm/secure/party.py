"""The client's half of the protocol, for one round: four steps, each done once, in their order.

What it keeps is secret and in memory alone. A site that was restarted in between has lost it and drops out.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from hashlib import sha256

import numpy as np
import torch

from fedfm.core.update import Tensors
from fedfm.errors import BadUpdate
from fedfm.secure import masks, shamir
from fedfm.secure.agreement import KEY, NONCE, TAG, KeyPair, seal, unseal
from fedfm.secure.fixed_point import Ring, Vector
from fedfm.secure.letters import MARK, bytes_in, clients_in, numbers_in, of_bytes, table

TEXT = 2 * shamir.SHARE
"""Bytes of what a client deals to another: a share of its seed, and one of its secret mask key."""
SEALED = NONCE + TEXT + TAG
DIGEST = 32
SEED_SHARE, KEY_SHARE = 0, 1
"""Which of the two shares."""
CANNOT, CAN = 0, 1
"""First byte of what is revealed: whether the share is there."""


class Party:
    """A client in one round.

    Args:
        round: number of the round.
        needed: how many of so many peers the secrets of a client must need at least.
    """

    def __init__(self, round: int, needed: Callable[[int], int]) -> None:
        self.round = round
        self.needed = needed
        self._step, self._quorum = "keys", 0
        self._cipher, self._mask = KeyPair(), KeyPair()
        self._seed = os.urandom(KEY)

    def keys(self) -> dict[str, torch.Tensor]:
        """Two public keys: one to be written to, one for masks.

        Raises:
            BadUpdate: asked out of turn. So do the other steps, and when the server's message is none that they know.
        """
        self._turn("keys", "shares")
        return of_bytes("keys", table([self._cipher.public, self._mask.public], KEY))

    def shares(self, message: Tensors) -> dict[str, torch.Tensor]:
        """Shares of the seed of its own mask and of its secret mask key, each sealed for one peer."""
        self._turn("shares", "present")
        place = numbers_in(message, "place")
        self.peers = clients_in(message, "peers")
        keys = bytes_in(message, "keys", len(self.peers), 2, KEY)
        if len(place) != 3 or place[0] not in self.peers:
            raise BadUpdate("the server's list of peers leaves this client out")
        self.own, self.clients, self.threshold = place
        if not self.needed(len(self.peers)) <= self.threshold <= len(self.peers) <= self.clients:
            raise BadUpdate(
                f"the server asks for a threshold of {self.threshold} with {len(self.peers)} peers; it must be at "
                f"least {self.needed(len(self.peers))}"
            )
        self._keys = {peer: (row[0].tobytes(), row[1].tobytes()) for peer, row in zip(self.peers, keys, strict=True)}
        if self._keys[self.own] != (self._cipher.public, self._mask.public):
            raise BadUpdate("the server passes other keys on than this client's")
        if len({key for both in self._keys.values() for key in both}) != 2 * len(self.peers):
            raise BadUpdate("the server passes one key on as that of two clients")
        points = [peer + 1 for peer in self.peers]
        seeds = shamir.deal(self._seed, self.threshold, points)
        secrets = shamir.deal(self._mask.secret, self.threshold, points)
        self._own_share = seeds[self.peers.index(self.own)]
        sealed, commitments = [], []
        for peer, seed, secret in zip(self.peers, seeds, secrets, strict=True):
            commitments += [committed(SEED_SHARE, self.own, peer, seed), committed(KEY_SHARE, self.own, peer, secret)]
            if peer != self.own:
                key = self._cipher.agreed(self._keys[peer][0], "shares", self.round, self.own, peer)
                sealed.append(seal(key, seed + secret))
        rows = table(commitments, DIGEST).reshape(len(self.peers), 2, DIGEST)
        return of_bytes("sealed", table(sealed, SEALED)) | of_bytes("commitments", rows)

    def meet(self, message: Tensors) -> dict[str, torch.Tensor]:
        """Learn who is present; what is left of the message is for the method."""
        self._turn("present", "masked")
        self.present = clients_in(message, "present")
        present = set(self.present)
        self.near = [peer for peer in self.peers if peer in present]
        if self.own not in self.near or self.present[-1] >= self.clients:
            raise BadUpdate("the server's list of who is present leaves this client out, or names strangers")
        if len(self.near) < self.threshold:
            raise BadUpdate(f"{len(self.near)} of its peers are present, fewer than the threshold {self.threshold}")
        return {name: tensor for name, tensor in message.items() if not name.startswith(MARK)}

    def mask(self, vector: Vector, ring: Ring, quorum: int = 0) -> dict[str, torch.Tensor]:
        """The vector with all masks on it, packed; the vector itself is overwritten.

        Of a sum over fewer than ``quorum`` clients this one will reveal nothing, as noise would be missing in it.

        With $s_{uv}$ the secret of clients u and v, and $b_u$ the own seed:
        $y_u = x_u + PRG(b_u) + \\sum_{v > u} PRG(s_{uv}) - \\sum_{v < u} PRG(s_{uv})$.
        """
        self._turn("masked", "unmask")
        self._quorum = quorum
        masks.add(vector, self._seed)
        for peer in self.near:
            if peer != self.own:
                seed = shared_seed(self._mask, self._keys[peer][1], self.round, self.own, peer)
                masks.add(vector, seed, 1 if peer > self.own else -1)
        del self._mask, self._seed
        return of_bytes("masked", ring.pack(vector))

    def unmask(self, message: Tensors) -> dict[str, torch.Tensor]:
        """For each peer who was present a share: of its seed if it survived, of its mask key if it dropped out.

        Never both: it is asked once, and nobody may stand in both lists.
        """
        self._turn("unmask", "")
        survivors, dropouts = clients_in(message, "survivors"), clients_in(message, "dropouts")
        if both := set(survivors) & set(dropouts):
            raise BadUpdate(f"the server asks for both secrets of client {min(both)}")
        if sorted(survivors + dropouts) != self.present or self.own not in survivors:
            raise BadUpdate("who survived and who dropped out are not those who were present")
        living = set(survivors).intersection(self.near)
        if len(living) < self.threshold:
            raise BadUpdate(f"{len(living)} of its peers survived, fewer than the threshold {self.threshold}")
        if len(survivors) < self._quorum:
            raise BadUpdate(f"{len(survivors)} clients survived, fewer than the {self._quorum} who add enough noise")
        others = [peer for peer in self.near if peer != self.own]
        sealed = dict(zip(others, bytes_in(message, "sealed", len(others), SEALED), strict=True))
        rows = []
        for peer in self.near:
            if peer == self.own:
                rows.append(bytes([CAN]) + self._own_share)
                continue
            try:
                key = self._cipher.agreed(self._keys[peer][0], "shares", self.round, peer, self.own)
                text = unseal(key, sealed[peer].tobytes())
            except BadUpdate:
                rows.append(bytes([CANNOT]) + bytes(shamir.SHARE))
                continue
            which = SEED_SHARE if peer in living else KEY_SHARE
            rows.append(bytes([CAN]) + text[which * shamir.SHARE : (which + 1) * shamir.SHARE])
        del self._cipher, self._own_share
        return of_bytes("revealed", table(rows, 1 + shamir.SHARE))

    def _turn(self, step: str, then: str) -> None:
        if self._step != step:
            due = f"when {self._step!r} was due" if self._step else "after the last step"
            raise BadUpdate(f"it was asked for {step!r} {due}: each step of secure aggregation is done once, in order")
        self._step = then


def shared_seed(own: KeyPair, public: bytes, round: int, one: int, other: int) -> bytes:
    """The seed of the mask that two clients have in common, from one's keys and the other's public key."""
    return own.agreed(public, "mask", round, min(one, other), max(one, other))


def committed(which: int, dealer: int, holder: int, share: bytes) -> bytes:
    """What ties a dealer to a share and tells nothing of it, as shares are uniform."""
    return sha256(np.array([which, dealer, holder], "<i8").tobytes() + share).digest()
