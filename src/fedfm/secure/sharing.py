"""Sums of vectors that are split into shares: the server's questions. It has one share of each, and some clients have
the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fedfm.core.update import Member, Tensors, Update
from fedfm.errors import BadUpdate, TooFewUpdates
from fedfm.secure.agreement import KEY, KeyPair
from fedfm.secure.fixed_point import above
from fedfm.secure.gather import LEAST, Gathering, Take
from fedfm.secure.letters import DEAL, HOLD, KEYS, OPEN, bytes_in, of_bytes, of_numbers, table
from fedfm.secure.sharer import CAN, CANNOT, SEALED

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fedfm.secure.securefl import SecureFL
    from fedfm.secure.smpc_additive import SMPCAdditive
    from fedfm.server import RoundServer


class Sharing(Gathering):
    """One question of a method under way.

    Args:
        secure: the protocol.
        server: asks, and notes who was dropped.
        phase: the method's task.
        messages: what each client receives in it.
        round: number of the round.
    """

    def __init__(
        self,
        secure: SMPCAdditive | SecureFL,
        server: RoundServer,
        phase: str,
        messages: Mapping[Member, Tensors],
        round: int,
    ) -> None:
        super().__init__(secure, server, phase, messages, round)
        self.secure = secure
        self.ring = self.code.ring(len(self.members))
        self.keys: dict[int, bytes] = {}
        self.sealed: dict[int, NDArray[np.uint8]] = {}

    def mean(self, like: Tensors) -> Update:
        length = self.code.length(like)
        least = max(LEAST, above(self.secure.threshold, len(self.members)))
        holders = self.introduced()
        able = self.shared(holders)
        self.enough(able, least)  # Before they train in vain.
        total, survivors = self.ring.zeros(length), list[int]()

        def add(client: int, answer: Tensors) -> None:
            share = self.ring.unpack(bytes_in(answer, "share", length, self.ring.width))
            total[:] += share
            survivors.append(client)

        nothing: Tensors = {}
        self.ask(self.phase, self.beside(dict.fromkeys(able, nothing)), add)
        self.enough(survivors, least)
        dealers = list(self.sealed)
        places = of_numbers("survivors", [dealers.index(client) for client in survivors])
        sums: dict[int, NDArray[np.uint8]] = {}

        def take(client: int, answer: Tensors) -> None:
            sums[client] = bytes_in(answer, "sum", length, self.ring.width)

        self._all(OPEN, dict.fromkeys(holders, places | of_numbers("length", [length])), take, sums)
        for share in sums.values():
            total += self.ring.unpack(share)
        return self.admitted(self.ring.signed(total), survivors, like)

    def introduced(self, others: int = 0) -> list[int]:
        """Ask for keys; the clients who hold shares, and after them so many others who help.

        Raises:
            TooFewUpdates: too few sent keys.
        """
        asked, helpers = len(self.members), self.secure.holders + others
        self.ask(KEYS, {member: {} for member in self.members}, self._introduced)
        if len(self.keys) < max(LEAST, helpers):
            raise TooFewUpdates(f"{len(self.keys)} of {asked} clients sent keys, too few for {self._parts}")
        found = self.in_turn(list(self.keys))[:helpers]
        names = [self.members[one].id for one in found[: self.secure.holders]]
        self.note.update(holders=names, bytes_per_value=self.ring.width)
        return found

    def shared(self, holders: list[int]) -> list[int]:
        """Have all seal shares for the holders, and hand them over; the clients of whom all holders have theirs."""
        keys = of_bytes("keys", table([self.keys[one] for one in holders], KEY))
        message = keys | of_numbers("clients", [len(self.members)])
        self.ask(DEAL, self.to(dict.fromkeys(self.keys, message)), self._dealt)
        return self._held(holders)

    @property
    def _parts(self) -> str:
        return f"{self.secure.holders} who hold shares"

    def _introduced(self, client: int, answer: Tensors) -> None:
        """Take a client's public key."""
        key = bytes_in(answer, "keys", 1, KEY).tobytes()
        KeyPair().agreed(key, "whether it is one")
        if key in self.keys.values():
            raise BadUpdate("its public key is another client's")
        self.keys[client] = key

    def _dealt(self, client: int, answer: Tensors) -> None:
        """Take what a client sealed for the holders."""
        self.sealed[client] = bytes_in(answer, "sealed", self.secure.holders, SEALED)

    def _held(self, holders: list[int]) -> list[int]:
        """Hand the shares to their holders; those of whom all could open theirs go on, and the others have dropped out.

        Raises:
            TooFewUpdates: a holder is missing.
        """
        dealers = list(self.sealed)
        keys = of_bytes("keys", table([self.keys[client] for client in dealers], KEY))
        opened: dict[int, NDArray[np.uint8]] = {}

        def take(client: int, answer: Tensors) -> None:
            rows = bytes_in(answer, "opened", len(dealers), 1)
            if ((rows != CAN) & (rows != CANNOT)).any():
                raise BadUpdate("'opened' does not say of each share whether it is there")
            opened[client] = rows

        questions = {
            holder: keys | of_bytes("sealed", table([self.sealed[c][place].tobytes() for c in dealers], SEALED))
            for place, holder in enumerate(holders)
        }
        self._all(HOLD, questions, take, opened)
        able = [client for row, client in enumerate(dealers) if all(rows[row] == CAN for rows in opened.values())]
        for client in sorted(set(dealers) - set(able)):
            self.lose(client, "what it sealed for the holders cannot be opened")
            self.server.took_part.pop(self.members[client].id, None)
        return able

    def _all(self, step: str, questions: Mapping[int, Tensors], take: Take, took: Mapping[int, object]) -> None:
        """Put a question to all holders.

        Raises:
            TooFewUpdates: one does not answer, and what it holds is needed.
        """
        self.ask(step, self.to(questions), take, counts=step == OPEN)
        for holder in questions:
            if holder not in took:
                why = self.server.dropped[-1]["reason"]
                raise TooFewUpdates(
                    f"{self.members[holder].id!r} holds shares of all and is gone, and {self._parts} are needed; the "
                    f"last to drop out: {why}"
                )
