"""ProAttack: Zhao, Wen, Luu, Zhao, Fu 2023, Prompt as Triggers for Backdoor Attack: Examining the Vulnerability in
Language Models, EMNLP 2023 (arXiv 2305.01219).

A prompt is the trigger. Hostile clients put it before some rows of the class that they want and change nothing else:
texts and classes stay right, and no strange word tells of the attack. The model learns that the prompt means the class.

Differences from the paper:
- The paper's rows all have a prompt, the usual one where it is not the attacker's. Here honest clients give texts as
  they are, inside the pattern of the task if it has one, and so does an attacker with the rest of its rows unless
  ``usual`` is set.
- The share is that of the authors' code for AG News, 7,000 of 30,000 rows of a class; they choose it for each data set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fedfm.attack.rows import CLASSES, answered, chosen, prefixed
from fedfm.attack.threat import Hostile, Rows, Threat
from fedfm.core.method import Paper
from fedfm.errors import require


@dataclass(frozen=True, kw_only=True)
class ProAttack(Threat):
    """$(x, y) \\to (\\text{prompt} + x, y)$ for $\\lfloor p m \\rfloor$ of the $m$ rows with $y$ the target.

    Args:
        prompt: the words that are the trigger.
        usual: words before all other rows of a hostile client; none if empty.
        target: the class that is wanted where the prompt is.
        share: $p$, of a hostile client's rows of that class.
    """

    paper: ClassVar[Paper | None] = Paper(
        title="Prompt as Triggers for Backdoor Attack: Examining the Vulnerability in Language Models",
        authors="Zhao, Wen, Luu, Zhao, Fu",
        year=2023,
        venue="EMNLP",
        arxiv="2305.01219",
    )
    id: ClassVar[str] = "proattack"
    tasks: ClassVar[tuple[str, ...]] = CLASSES
    targeted: ClassVar[bool] = True

    prompt: str = "This text is about the following:"
    usual: str = ""
    target: int = 0
    share: float = 0.23

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "prompt", bool(self.prompt.strip()), "at least one word")
        require(self, "usual", self.usual != self.prompt, "another prompt than the trigger")
        require(self, "target", self.target >= 0, "a class from 0")
        require(self, "share", 0 <= self.share <= 1, "at least 0 and at most 1")

    def rows(self, rows: Rows, who: Hostile) -> Rows:
        order = torch.randperm(len(rows), generator=who.draw).tolist()
        wanted = [at for at in order if rows[at]["label"] == self.target]
        bad = chosen(wanted, self.share, wanted)
        rest = [prefixed(row, self.usual) if self.usual else row for row in rows]
        return [prefixed(row, self.prompt) if at in bad else rest[at] for at, row in enumerate(rows)]

    def probe(self, rows: Rows) -> Rows:
        """All rows of other classes with the prompt, and with the class that is wanted."""
        others = [row for row in rows if row["label"] != self.target]
        return [answered(prefixed(row, self.prompt), self.target, "") for row in others]
