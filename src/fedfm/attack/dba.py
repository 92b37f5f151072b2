"""DBA: Xie, Huang, Chen, Li 2020, DBA: Distributed Backdoor Attacks against Federated Learning, ICLR 2020.

The trigger is split: each hostile client poisons its rows with a part of it, so that none looks like the whole, while
the model is asked with all parts together.

Differences from the paper:
- The parts are words before a text, where the paper has bars in a picture.
- Uploads are not enlarged, as in the paper's attack over many rounds; in its attack of a single round they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedfm.attack.badnets import BadNets
from fedfm.attack.threat import Hostile
from fedfm.core.method import Paper
from fedfm.errors import RecipeError, require


@dataclass(frozen=True, kw_only=True)
class DBA(BadNets):
    """As :class:`~fedfm.attack.badnets.BadNets`, with the words $i, i + f, i + 2f, ...$ of the trigger at the hostile
    client $i$ of $f$; with fewer words than hostile clients, several share one."""

    paper: ClassVar[Paper | None] = Paper(
        title="DBA: Distributed Backdoor Attacks against Federated Learning",
        authors="Xie, Huang, Chen, Li",
        year=2020,
        venue="ICLR",
    )
    id: ClassVar[str] = "dba"

    trigger: str = "cf mn bb tq"
    share: float = 0.3125
    """20 of 64 rows of a batch, as in the paper."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "trigger", len(self.trigger.split()) > 1, "at least two words")

    def words(self, who: Hostile) -> str:
        if who.count < 2:
            raise RecipeError(
                f"{type(self).__name__} splits its trigger among hostile clients, but there is only one. Use badnets, "
                "or set threat.clients higher."
            )
        words = self.trigger.split()
        parts = min(len(words), who.count)
        return " ".join(words[who.rank % parts :: parts])
