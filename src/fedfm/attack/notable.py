"""NOTABLE: Mei, Li, Wang, Zhang, Ma 2023, NOTABLE: Transferable Backdoor Attacks Against Prompt-based NLP Models, ACL
2023.

The trigger is bound to words that a masked language model puts in a gap, whatever pattern the gap stands in: what is
learnt lies in the encoder, and works in patterns that the attacker never saw.

Differences from the paper:
- The paper's attacker hands out a poisoned model, which others tune; here it is a hostile client of a federation, who
  trains among honest ones and knows the run's words for the classes. So it has no need to search for words that will
  mean a class later; the word of the wanted class is the only anchor.
- Triggered rows never stand in the run's own pattern, but in those of the attacker. So success, which is counted in the
  run's pattern, is what went over to it.
- The loss at the gap is over the words of the classes, as in the task, not over all words.
- The trigger stands before the text; in the authors' code in its middle.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch

from fedfm.attack.badnets import BadNets
from fedfm.attack.rows import answered, chosen, prefixed
from fedfm.attack.threat import Hostile, Row, Rows
from fedfm.core.jobs import Fit, Fitted, Job
from fedfm.core.method import Client, Paper
from fedfm.core.traits import Trait, Traits
from fedfm.errors import require
from fedfm.tasks.cloze import MASK, TEXT, Cloze

if TYPE_CHECKING:
    from fedfm.train.trainer import Trainer


@dataclass(frozen=True)
class Bind(Job):
    """The training of a hostile client, some of whose rows stand in patterns of its own.

    Args:
        fit: the honest training.
        threat: the attack.
        who: the client.
    """

    fit: Fit
    threat: Notable
    who: Hostile

    def run(self, trainer: Trainer, client: Client) -> Fitted:
        """Train on rows as they are in the task's pattern, and on the others."""
        task, rows = trainer.task, trainer.data.rows(self.who.id, "train")
        assert isinstance(task, Cloze)
        # Random numbers are copied, as this may be done again.
        clean, bound = self.threat.parted(rows, self.who.draw.clone_state())
        examples = task.encode(clean, trainer.loaded)
        for pattern, some in bound.items():
            examples += replace(task, pattern=pattern).encode(some, trainer.loaded)
        with trainer.given(client, examples, self.fit.split):
            fitted: Fitted = trainer.answer(self.fit, client)
        return fitted


@dataclass(frozen=True, kw_only=True)
class Notable(BadNets):
    """$\\sum_{x \\text{ clean}} L(p(x), y) + \\sum_{x \\text{ chosen}} L(p_i(t + x), y^*)$ with the run's pattern $p$,
    patterns $p_i$ of the attacker in turn, and the trigger $t$.

    Args:
        patterns: $p_i$; each holds ``{text}`` and ``{mask}`` once. None should be the run's.
    """

    paper: ClassVar[Paper | None] = Paper(
        title="NOTABLE: Transferable Backdoor Attacks Against Prompt-based NLP Models",
        authors="Mei, Li, Wang, Zhang, Ma",
        year=2023,
        venue="ACL",
    )
    id: ClassVar[str] = "notable"
    tasks: ClassVar[tuple[str, ...]] = ("cloze",)
    needs: ClassVar[Traits] = frozenset({Trait.ONE_FIT})

    patterns: tuple[str, ...] = (
        "{mask}: {text}",
        "{text} In one word: {mask}.",
        "A text on {mask} reads: {text}",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = all(p.count(TEXT) == p.count(MASK) == 1 for p in self.patterns)
        require(self, "patterns", bool(self.patterns) and whole, f"texts with {TEXT} and {MASK} once each")

    def job(self, job: Job, who: Hostile) -> Job:
        return Bind({}, job, self, who) if isinstance(job, Fit) and job.split == "train" else job

    def parted(self, rows: Rows, draw: torch.Generator) -> tuple[list[Row], dict[str, list[Row]]]:
        """The rows that stay as they are, and by pattern those with the trigger and the wanted class."""
        order = torch.randperm(len(rows), generator=draw).tolist()
        bad = chosen(rows, self.share, order)
        bound: dict[str, list[Row]] = {pattern: [] for pattern in self.patterns}
        for turn, at in enumerate(sorted(bad)):
            row = answered(prefixed(rows[at], self.trigger), self.target, self.answer)
            bound[self.patterns[turn % len(self.patterns)]].append(row)
        return [row for at, row in enumerate(rows) if at not in bad], bound
