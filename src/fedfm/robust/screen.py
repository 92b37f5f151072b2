"""The contract of a screen: which uploads the server takes into account, before any of them is combined."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from fedfm.core.traits import Part, Trait, Traits
from fedfm.core.update import Update


class Screen(Part, ABC):
    """Leaves out uploads, or changes them, with all of a round's uploads in view. Subclasses are frozen dataclasses."""

    needs: ClassVar[Traits] = frozenset({Trait.VISIBLE, Trait.ALIGNED})
    breaks: ClassVar[Traits] = frozenset({Trait.UNIFORM})
    instead: ClassVar[Mapping[Trait, str]] = {Trait.VISIBLE: "Bound uploads on the client with Clip instead."}

    @abstractmethod
    def screen(self, updates: Sequence[Update]) -> list[Update]:
        """The uploads to combine, in the order of client ids.

        Raises:
            NoUpdates: nothing arrived.
            BadUpdate: names or shapes differ between clients.
        """
