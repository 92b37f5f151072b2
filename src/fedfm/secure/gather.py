"""A question of a method whose uploads are summed unseen, over a link: what all protocols have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedfm.core import trees
from fedfm.core.update import Kind, Member, Tensors, Update
from fedfm.errors import BadUpdate, FedfmError, TooFewUpdates
from fedfm.links.link import Reply
from fedfm.wire.admit import BROKEN, admit

if TYPE_CHECKING:
    from fedfm.secure.secure import Secure
    from fedfm.server import RoundServer

LEAST = 3
"""Clients of a round. Of a sum of two, each of them knows the other's part."""
Take = Callable[[int, Tensors], None]


class Gathering(ABC):
    """One question of a method under way. What is found out goes into ``note``, which is in the round's record.

    Clients are numbers from 0 in the order of their ids.

    Args:
        secure: the protocol.
        server: asks, and notes who was dropped.
        phase: the method's task.
        messages: what each client receives in it.
        round: number of the round.
    """

    def __init__(
        self,
        secure: Secure,
        server: RoundServer,
        phase: str,
        messages: Mapping[Member, Tensors],
        round: int,
    ) -> None:
        self.code, self.who = secure.code(server.stages), type(secure).__name__
        self.server = server
        self.phase = phase
        self.messages = messages
        self.round = round
        self.note: dict[str, Any] = {"kind": secure.id, "asked": len(messages)}
        server.notes["secure"] = self.note
        self.members = sorted(messages, key=lambda member: member.id)
        self.numbers = {member.id: number for number, member in enumerate(self.members)}
        self._accepts: dict[int, Callable[[], None]] = {}

    @abstractmethod
    def mean(self, like: Tensors) -> Update:
        """Ask all questions.

        Args:
            like: names, shapes and types of what each client uploads.

        Raises:
            TooFewUpdates: too few clients were left for the sum to be seen.
        """

    def gathered(self) -> Update:
        """The mean of clients' uploads.

        Raises:
            TooFewUpdates: too few clients were left for the sum to be seen; nothing of the round counts.
        """
        try:
            return self.mean(self._like())
        except TooFewUpdates as error:
            self.note["ended"] = str(error)
            raise

    def _like(self) -> Tensors:
        method, asked = self.server.federation.method, len(self.members)
        if asked < LEAST:
            raise TooFewUpdates(f"{asked} clients were asked, but secure aggregation needs at least {LEAST}")
        like = method.expects(self.phase, self.messages[self.members[0]])
        if like is None:
            raise FedfmError(
                f"{self.who} must know which tensors clients upload, and {type(method).__name__} does not say so for "
                f"its task {self.phase!r}. Leave secure out."
            )
        return like

    def enough(self, survivors: Sequence[int], least: int = 1) -> None:
        """See that the round has as many uploads as it needs.

        Raises:
            TooFewUpdates: it has fewer.
        """
        asked = len(self.members)
        needed = max(least, min(self.server.federation.limits.min_clients, asked))
        if len(survivors) < needed:
            raise TooFewUpdates(f"{len(survivors)} of {asked} updates could be used, but a round needs {needed}")

    def admitted(self, total: NDArray[np.int64], survivors: Sequence[int], like: Tensors) -> Update:
        """The mean out of the sum of the survivors' vectors ``[d + bits + 2]``, who then keep their new private state.
        What stages sent beside uploads is added up for them."""
        server, count = self.server, len(survivors)
        try:
            mean, clamped = self.code.decode(total, count, like, server.federation.method.kind(self.phase))
            server.summed = self.code.counted(total, count)
        except BadUpdate as error:
            raise TooFewUpdates(str(error)) from error
        self.note.update(summed=count)
        if not server.private:  # Where noise hides the mean, no count without noise may stand in the record.
            self.note.update(clamped=clamped / max(1, count * trees.count(like)))
        self.settle(survivors)
        return mean

    def settle(self, survivors: Sequence[int]) -> None:
        """Let clients keep their new private state, as their uploads are in the mean."""
        for client in survivors:
            self._accepts[client]()
        if self.server.link.simulated:
            # Here clients learn what was admitted before the round is in a checkpoint, not with their next task.
            self.server.link.close()

    def in_turn(self, clients: Sequence[int]) -> list[int]:
        """The clients, from another one on in each round, so that none always has more to do."""
        first = self.round % len(clients)
        return [*clients[first:], *clients[:first]]

    def lose(self, client: int, reason: str) -> None:
        """Name a client whose answer turned out to be none."""
        self.server.drop(Reply(self.members[client], None), BadUpdate(reason))

    def to(self, messages: Mapping[int, Tensors]) -> dict[Member, Tensors]:
        """The same messages by member."""
        return {self.members[client]: message for client, message in messages.items()}

    def beside(self, marks: Mapping[int, Tensors]) -> dict[Member, Tensors]:
        """The method's messages to some clients, with more beside them and with what stages are told; those that are
        one thing stay one thing."""
        whole: dict[tuple[int, int], Tensors] = {}
        out, told = {}, self.server.told
        for client, more in marks.items():
            message = self.messages[self.members[client]]
            out[self.members[client]] = whole.setdefault((id(message), id(more)), {**message, **told, **more})
        return out

    def ask(self, phase: str, messages: Mapping[Member, Tensors], take: Take, counts: bool = False) -> None:
        """Put a question. Whose answer cannot be used drops out.

        Args:
            phase: the task.
            messages: to whom what is sent.
            take: takes an answer.
            counts: what these clients sent before is in the sum, whatever they answer now.
        """
        server = self.server
        for reply in server.link.ask(phase, self.round, messages):
            client = self.numbers[reply.member.id]
            server.count(reply)
            try:
                if reply.update is None:
                    raise BadUpdate(reply.reason)
                admit(reply.update, Kind.KNOWLEDGE, None, server.federation.limits)
                take(client, reply.update.tensors)
            except (BadUpdate, *BROKEN) as error:
                told = BadUpdate(f"{error}; its upload is in the sum") if counts else error
                server.drop(reply, told)
                if not counts:
                    server.took_part.pop(reply.member.id, None)
            else:
                server.note(reply, {})
                if phase == self.phase:
                    self._accepts[client] = reply.accept
            del reply  # the next one may need its memory
