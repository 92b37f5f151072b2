"""Uploads that are judged on shares and summed by how far they are trusted: the server's questions."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedfm.core import trees
from fedfm.core.update import Kind, Tensors, Update
from fedfm.errors import FedfmError, TooFewUpdates
from fedfm.robust.sight import Sight
from fedfm.secure.agreement import KEY
from fedfm.secure.fixed_point import Vector, above
from fedfm.secure.gather import LEAST
from fedfm.secure.judge import DEALT, MODULUS, WORD, bytes_of, dot, drawn, numbers_of
from fedfm.secure.letters import CHECK, OPEN, SQUARE, bytes_in, of_bytes, of_numbers, table
from fedfm.secure.sharing import Sharing
from fedfm.secure.unit_point import PROJECTIONS, UnitPoint, projected

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Judging(Sharing):
    """One question of a method under way; arguments as of :class:`fedfm.secure.gather.Gathering`."""

    code: UnitPoint

    def mean(self, like: Tensors) -> Update:
        count, length = trees.count(like), self.code.length(like)
        if 2 * count**1.5 * self.code.levels >= 2**62:
            raise FedfmError(f"SecureFL has no room for {count} values: train fewer, or lower its bits.")
        least = max(LEAST, above(self.secure.threshold, len(self.members)))
        [holder, dealer] = self.introduced(1)
        self.note.update(dealer=self.members[dealer].id)
        able = self.shared([holder])
        self.enough(able, least)
        squares = self._squares(holder, dealer, len(able), count)
        shares: dict[int, Vector] = {}

        def take(client: int, answer: Tensors) -> None:
            shares[client] = self.ring.unpack(bytes_in(answer, "share", length, self.ring.width))

        nothing: Tensors = {}
        self.ask(self.phase, self.beside(dict.fromkeys(able, nothing)), take)
        self.enough(list(shares), least)
        own = self._own(like)
        direction = self.code.encode(own, self.ring)[:count]
        kept = self._judged(holder, dealer, shares, squares, direction)
        self.enough(list(kept), least)
        weights = {client: self._trust(score) for client, score in kept.items()}
        trusted = [client for client, weight in weights.items() if weight]
        self.note.update(judged=len(shares), trusted=len(trusted), summed=len(trusted))
        size = math.sqrt(math.fsum(float(t.double().square().sum()) for t in own.tensors.values()))
        total = np.zeros(count, np.int64)
        if trusted:
            total = self._opened(holder, shares, weights, length)[:count]
        self.settle(list(kept))
        step = size * self.code.step / max(1, sum(weights.values()))
        return Update(unflattened(total * step, like), float(len(kept)), kind=Kind.DELTA, member="sum")

    def _squares(self, holder: int, dealer: int, count: int, length: int) -> Tensors:
        """What the dealer dealt for so many clients."""
        found: dict[int, Tensors] = {}

        def take(client: int, answer: Tensors) -> None:
            for name, width in (("seeds", KEY), ("parts", WORD), ("sealed", DEALT)):
                bytes_in(answer, name, count, width)
            found[client] = answer

        message = of_bytes("keys", table([self.keys[holder]], KEY)) | of_numbers("square", [count, length])
        self.ask(SQUARE, self.to({dealer: message}), take)
        if dealer not in found:
            raise TooFewUpdates(f"{self.members[dealer].id!r} was to deal the squares of the round and is gone")
        return found[dealer]

    def _own(self, like: Tensors) -> Update:
        """What the server would upload if the public rows were its own."""
        server = self.server
        own = Sight(server, server.federation.method, server.state, {}, len(server.federation.public)).own()
        if own.tensors.keys() != like.keys():
            raise FedfmError("SecureFL compares uploads with the server's own, which has other tensors.")
        return own

    def _judged(
        self, holder: int, dealer: int, shares: dict[int, Vector], squares: Tensors, direction: Vector
    ) -> dict[int, int]:
        """Of the clients whose vector has the length 1 its product with a direction, in squares of a level."""
        clients, count, challenge = sorted(shares), len(direction), os.urandom(KEY)
        size = len(clients)
        seeds, parts = (bytes_in(squares, name, -1, width) for name, width in (("seeds", KEY), ("parts", WORD)))
        random = [drawn(count, seeds[row].tobytes()) for row in range(size)]
        mine = np.stack([shares[client][:count] for client in clients])
        apart = mine - np.stack(random)
        dealers = list(self.sealed)
        message = {
            **of_numbers("survivors", [dealers.index(client) for client in clients]),
            **of_numbers("length", [count]),
            **of_bytes("apart", bytes_of(apart)),
            **of_bytes("direction", bytes_of(direction)),
            **of_bytes("challenge", np.frombuffer(challenge, np.uint8).copy()),
            **of_bytes("keys", table([self.keys[dealer]], KEY)),
            **of_bytes("sealed", bytes_in(squares, "sealed", -1, DEALT)[:size].copy()),
        }
        answers: dict[int, Tensors] = {}

        def take(client: int, answer: Tensors) -> None:
            for name, shape in (("apart", (size, count)), ("sums", (size, PROJECTIONS + 1))):
                bytes_in(answer, name, *shape, WORD)
            for name in ("squares", "scores"):
                bytes_in(answer, name, size, WORD)
            answers[client] = answer

        self._all(CHECK, {holder: message}, take, answers)
        theirs = {
            name: numbers_of(bytes_in(answers[holder], name, *shape, WORD))
            for name, shape in (("apart", (-1, -1)), ("sums", (-1, -1)), ("squares", (-1,)), ("scores", (-1,)))
        }
        both, sums = apart + theirs["apart"], projected(mine, challenge) + theirs["sums"]
        kept = {}
        for row, client in enumerate(clients):
            part = int.from_bytes(parts[row].tobytes(), "little")
            own = dot(both[row], both[row]) + 2 * dot(both[row], random[row]) + part
            square = (own + int(theirs["squares"][row])) % MODULUS
            score = (dot(mine[row], direction) + int(theirs["scores"][row])) % MODULUS
            if self.code.short(sums[row].view(np.int64), count) and self.code.unit(square, count):
                kept[client] = score - MODULUS * (score >= MODULUS // 2)
            else:
                self.lose(client, "its vector does not have the length 1")
        return kept

    def _trust(self, score: int) -> int:
        """$T_k$, as a whole number of steps."""
        return max(0, score) * self.code.max_weight // self.code.levels**2

    def _opened(
        self, holder: int, shares: dict[int, Vector], weights: dict[int, int], length: int
    ) -> NDArray[np.int64]:
        """$\\sum_k T_k u_k$ in levels."""
        found: dict[int, Vector] = {}

        def take(client: int, answer: Tensors) -> None:
            found[client] = numbers_of(bytes_in(answer, "sum", length, WORD))

        by = [weights.get(client, 0) for client in sorted(shares)]
        self._all(OPEN, {holder: of_numbers("weights", by) | of_numbers("length", [length])}, take, found)
        total = found[holder].copy()
        for client, weight in weights.items():
            total += np.uint64(weight) * shares[client]
        return total.view(np.int64)


def unflattened(values: NDArray[np.floating[Any]], like: Tensors) -> dict[str, torch.Tensor]:
    """Values in the order of names, as tensors like these."""
    tensors, at = {}, 0
    for name, tensor in sorted(like.items()):
        tensors[name] = torch.from_numpy(values[at : at + tensor.numel()]).reshape(tensor.shape).to(tensor.dtype)
        at += tensor.numel()
    return {name: tensors[name] for name in like}
