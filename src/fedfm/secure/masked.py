"""Sums of masked vectors: four questions, of which the third is the method's own task."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedfm.core.update import Member, Tensors, Update
from fedfm.errors import BadUpdate
from fedfm.secure.blurred import Blurred
from fedfm.secure.fixed_point import above
from fedfm.secure.gather import Gathering
from fedfm.secure.graph import Neighbours
from fedfm.secure.hub import Hub
from fedfm.secure.letters import KEYS, SHARES, UNMASK
from fedfm.secure.maskers import Maskers
from fedfm.wire.stage import Stage

if TYPE_CHECKING:
    from fedfm.server import RoundServer


@dataclass(frozen=True)
class Masked(Blurred):
    """Subclasses say who shares secrets with whom.

    Args:
        threshold: part of a client's peers, itself and its neighbours, of whom more are needed to take its masks away;
            from 0.5, with which the server cannot have both secrets of a client by asking some of them for one and the
            others for the other.
    """

    phases: ClassVar[tuple[str, ...]] = (KEYS, SHARES, UNMASK)

    threshold: float = 2 / 3

    @abstractmethod
    def graph(self, clients: int) -> Neighbours:
        """Who shares secrets with whom in a round of so many clients."""

    def needed(self, peers: int) -> int:
        """Of so many peers, those who are needed to take masks away."""
        return above(self.threshold, peers)

    def parties(self, stages: Sequence[Stage] = ()) -> Maskers:
        return Maskers(self, stages)

    def gathering(self, server: RoundServer, phase: str, messages: Mapping[Member, Tensors], round: int) -> Gathering:
        return _Unmasking(self, server, phase, messages, round)


class _Unmasking(Gathering):
    """The server's questions."""

    def __init__(
        self, secure: Masked, server: RoundServer, phase: str, messages: Mapping[Member, Tensors], round: int
    ) -> None:
        super().__init__(secure, server, phase, messages, round)
        self.secure = secure

    def mean(self, like: Tensors) -> Update:
        secure, asked = self.secure, len(self.members)
        graph = secure.graph(asked)
        threshold, ring = secure.needed(len(graph[0]) + 1), self.code.ring(asked)
        self.note.update(neighbours=len(graph[0]), threshold=threshold, bytes_per_value=ring.width)
        hub = Hub(self.round, [member.id for member in self.members], graph, threshold, self.code.length(like), ring)
        self.ask(KEYS, {member: {} for member in self.members}, hub.keys)
        self.ask(SHARES, self.to(hub.introductions()), hub.shares)
        present = hub.present()
        self.ask(self.phase, self.beside(dict.fromkeys(next(iter(present.values())).tolist(), present)), hub.add)
        self.enough(hub.survivors, self.code.quorum(asked))

        def reveal(client: int, answer: Tensors) -> None:
            if wrong := hub.reveal(client, answer):
                names = ", ".join(repr(self.members[peer].id) for peer in wrong)
                raise BadUpdate(f"the shares that it revealed are not those that {names} dealt, or said to have dealt")

        self.ask(UNMASK, self.to(hub.questions()), reveal, counts=True)
        return self.admitted(hub.total(), hub.survivors, like)
