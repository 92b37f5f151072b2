"""The narrow seam between the server and its clients. Processes, sockets and Flower stay behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from fedfm.core.update import Member, Tensors, Update

if TYPE_CHECKING:
    from fedfm.core.method import Method
    from fedfm.store.clients import ClientStore
    from fedfm.train.trainer import Trainer


def _nothing() -> None:
    """Nothing to store."""


@dataclass(frozen=True)
class Reply:
    """What came back from one client.

    Args:
        member: who was asked.
        update: what it sent; ``None`` when it failed.
        reason: why it failed, in one line.
        bytes_down: encoded size of the message it received.
        bytes_up: encoded size of its update.
        seconds: how long it worked.
        steps: optimizer steps it took, as far as the link can see.
        memory: bytes that it needed at least, as far as the link can see.
        accept: to be called once the update has been admitted; only then the client keeps its new private state.
    """

    member: Member
    update: Update | None
    reason: str = ""
    bytes_down: int = 0
    bytes_up: int = 0
    seconds: float = 0.0
    steps: int = 0
    memory: int = 0
    accept: Callable[[], None] = field(default=_nothing, compare=False)


class Link(Protocol):
    """Asks clients to run a task of the method."""

    simulated: ClassVar[bool]
    """Whether all clients' data are in this process, so that references which pool them may run."""

    def __init__(self, method: Method, trainer: Trainer | None, store: ClientStore, **settings: Any) -> None:
        """The link of a run; settings are those of :class:`fedfm.links.worker.Worker`. Without a trainer, to clients
        who have their own."""
        ...

    def ask(self, phase: str, round: int, messages: Mapping[Member, Tensors]) -> Iterator[Reply]:
        """One reply for each message, in the order of member ids, each as soon as it is there."""
        ...

    def close(self) -> None:
        """Nothing more will be asked: what clients still have to know is told them."""
        ...


class Live(Link, Protocol):
    """A link whose clients work in their own time, each on its machine."""

    def begin(self, phase: str, round: int, messages: Mapping[Member, Tensors]) -> None:
        """Give clients a task and do not wait."""
        ...

    @property
    def in_flight(self) -> set[str]:
        """Ids of clients with a task that was begun, and whose reply was not taken."""
        ...

    def arrived(self) -> Reply:
        """The next reply to what was begun, whoever's it is."""
        ...
