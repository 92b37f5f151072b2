"""Sums of encrypted vectors: the server's questions. It passes keys on sealed, adds ciphertexts, and has some clients
open the sum."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedfm.core.update import Member, Tensors, Update
from fedfm.errors import BadUpdate, TooFewUpdates
from fedfm.secure.agreement import KEY
from fedfm.secure.cipher import Adder, Parameters
from fedfm.secure.gather import LEAST, Gathering
from fedfm.secure.holder import SEALED
from fedfm.secure.letters import DEAL, KEYS, OPEN, bytes_in, of_bytes, of_numbers, of_texts, table, texts_in

if TYPE_CHECKING:
    from fedfm.secure.ckks import CKKS
    from fedfm.server import RoundServer


class Opening(Gathering):
    """One question of a method under way.

    Args:
        secure: the protocol.
        server: asks, and notes who was dropped.
        phase: the method's task.
        messages: what each client receives in it.
        round: number of the round.
    """

    def __init__(
        self, secure: CKKS, server: RoundServer, phase: str, messages: Mapping[Member, Tensors], round: int
    ) -> None:
        super().__init__(secure, server, phase, messages, round)
        self.openers = secure.openers
        self.keys: dict[int, bytes] = {}

    def mean(self, like: Tensors) -> Update:
        self.meet()
        total, survivors = self.total(self.code.length(like))
        return self.admitted(total, survivors, like)

    def total(self, size: int) -> tuple[NDArray[np.int64], list[int]]:
        """The sum of vectors ``[d]``, and whose they are."""
        adder, survivors = Adder(self.parameters, size), list[int]()

        def add(client: int, answer: Tensors) -> None:
            adder.add(self.ciphers(answer, size))
            survivors.append(client)

        self.ask(self.phase, self.beside(dict.fromkeys(self.keys, self.marks)), add)
        self.enough(survivors, LEAST)
        return self.opened(adder, survivors, size), survivors

    def meet(self) -> None:
        """Have all send public keys, and one of them deal the key of the round."""
        self.ask(KEYS, {member: {} for member in self.members}, self.introduced)
        rows = list(self.keys)
        if len(rows) < LEAST:
            raise TooFewUpdates(f"{len(rows)} of {len(self.members)} clients sent keys, fewer than {LEAST}")
        self.parameters = Parameters.of(self.code.largest(len(rows)), len(rows))
        self.ring = self.code.ring(len(rows))
        public = of_bytes("keys", table([self.keys[row] for row in rows], KEY))
        dealt: list[Tensors] = []

        def take(client: int, answer: Tensors) -> None:
            secret, sealed = bytes_in(answer, "secret", -1), bytes_in(answer, "sealed", len(rows), SEALED)
            dealer = of_numbers("dealer", [rows.index(client)])
            dealt.append({**public, **dealer, **of_bytes("secret", secret), **of_bytes("sealed", sealed)})

        for client in self.in_turn(rows):
            self.ask(DEAL, self.to({client: public}), take)
            if dealt:
                break
            del self.keys[client]  # Who cannot deal has dropped out; the others' rows stay as they are.
        else:
            raise TooFewUpdates("none of the clients dealt a key of the round")
        self.marks = dealt[0]
        self.note.update(dealer=self.members[client].id, step=self.code.step)

    def introduced(self, client: int, answer: Tensors) -> None:
        """Take a client's public key."""
        key = bytes_in(answer, "keys", 1, KEY).tobytes()
        if key in self.keys.values():
            raise BadUpdate("its public key is another client's")
        self.keys[client] = key

    def ciphers(self, answer: Tensors, size: int) -> list[bytes]:
        """The ciphertexts of a vector ``[d]`` in an answer; the record has their bytes a value, and how often those of
        float32 that is."""
        texts = texts_in(answer, "cipher", len(self.parameters.lengths(size)), self.parameters.most)
        sent = sum(map(len, texts))
        self.note.update(bytes_per_value=round(sent / size, 1), expansion=round(sent / (4 * size), 2))
        return texts

    def opened(self, adder: Adder, able: Sequence[int], size: int) -> NDArray[np.int64]:
        """The sum in the clear, by those who can open it."""
        width = self.ring.width
        rows = self.agreed(OPEN, of_texts("cipher", adder.texts()), able, lambda a: bytes_in(a, "sum", size, width))
        return self.ring.signed(self.ring.unpack(rows))

    def agreed(
        self, step: str, question: Tensors, able: Sequence[int], read: Callable[[Tensors], NDArray[np.uint8]]
    ) -> NDArray[np.uint8]:
        """What clients say that something is which they alone can open.

        As many are asked as are to agree, and others for those who do not answer; if they do not agree, all.

        Args:
            step: the task.
            question: what is to be opened.
            able: who can do it.
            read: an answer.

        Raises:
            TooFewUpdates: too few could, or no answer is that of most.
        """
        found: dict[int, NDArray[np.uint8]] = {}

        def take(client: int, answer: Tensors) -> None:
            found[client] = read(answer)

        wanted, asked, able = min(self.openers, len(able)), 0, self.in_turn(able)
        while len(found) < wanted and asked < min(2 * wanted, len(able)):
            some = able[asked : asked + wanted - len(found)]
            asked += len(some)
            self.ask(step, self.to(dict.fromkeys(some, question)), take, counts=True)
        if len(found) < wanted:
            why = self.server.dropped[-1]["reason"]
            raise TooFewUpdates(f"{len(found)} of {asked} clients opened the sum, fewer than {wanted}; the last: {why}")
        said = {client: sha256(rows.tobytes()).digest() for client, rows in found.items()}
        if len(set(said.values())) > 1:
            self.ask(step, self.to(dict.fromkeys(able[asked:], question)), take, counts=True)
            said = {client: sha256(rows.tobytes()).digest() for client, rows in found.items()}
        right, votes = Counter(said.values()).most_common(1)[0]
        if 2 * votes <= len(said):
            raise TooFewUpdates(f"{len(said)} clients opened the sum, and no answer is that of most of them")
        self.note["opened"] = len(said)
        for client, one in said.items():
            if one != right:
                self.lose(client, "it opened the sum otherwise than most did; its upload is in the sum")
        return next(found[client] for client, one in said.items() if one == right)
