"""Screens that leave a given number of uploads out of each round, found by rows that the server has."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedfm.core.traits import Trait, Traits
from fedfm.core.update import Update
from fedfm.errors import RecipeError, require
from fedfm.robust.estimator import aligned
from fedfm.robust.screen import Screen
from fedfm.robust.sight import Sight


@dataclass(frozen=True)
class LeavingOut(Screen):
    """Base of screens that leave out the $f$ worst uploads.

    Args:
        hostile: $f$, how many uploads are left out of each round.
    """

    needs: ClassVar[Traits] = Screen.needs | {Trait.ONE_ASK, Trait.GLOBAL}
    breaks: ClassVar[Traits] = frozenset()
    public: ClassVar[bool] = True

    hostile: int = 1

    def __post_init__(self) -> None:
        require(self, "hostile", self.hostile >= 0, "at least 0")

    def screen(self, updates: Sequence[Update], sight: Sight) -> list[Update]:
        """All but $f$ uploads, as they came.

        Raises:
            RecipeError: no more than $f$ uploads arrived.
        """
        aligned(updates)
        enough(self, self.hostile, len(updates))
        worst = self.worst(updates, sight) if self.hostile else ()
        return [update for update in updates if update.member not in worst]

    @abstractmethod
    def worst(self, updates: Sequence[Update], sight: Sight) -> Sequence[str]:
        """By client id, which $f$ uploads are left out; $f$ is above 0 and below their number."""


def enough(part: Screen, hostile: int, arrived: int) -> None:
    """Raise ``RecipeError`` unless something is left when ``hostile`` of the uploads that ``arrived`` are left out."""
    if hostile >= arrived:
        raise RecipeError(
            f"{type(part).__name__} hostile must be below the {arrived} uploads that arrived, but is {hostile}. "
            "Lower hostile, or let the sampler draw more clients."
        )
