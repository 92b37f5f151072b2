"""The contract of an audit: it looks at a round and changes nothing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from fedfm.core.method import Method, Server, State
from fedfm.core.traits import Part, Trait, Traits
from fedfm.core.update import Update


class Audit(Part, ABC):
    """Shown all that the server sees of each round. Subclasses are frozen dataclasses.

    Server hooks are pure, so an audit can ask what the state would have been with other uploads:
    ``method.apply(before, method.combine(before, some, server.mean), server.rule)``.
    """

    id: ClassVar[str]
    needs: ClassVar[Traits] = frozenset({Trait.VISIBLE, Trait.ONE_ASK})

    @abstractmethod
    def look(self, server: Server, method: Method, before: State, updates: Sequence[Update]) -> Mapping[str, float]:
        """What it finds, by client; it goes into the round's record under the audit's id.

        Args:
            server: the federation in this round; ``server.do`` answers jobs on the server's own rows.
            method: the federated method.
            before: the state at the beginning of the round.
            updates: the admitted uploads, in the order of client ids.
        """
