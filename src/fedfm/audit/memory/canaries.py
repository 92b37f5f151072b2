"""Canaries: Carlini, Liu, Erlingsson, Kos, Song 2019, The Secret Sharer: Evaluating and Testing Unintended Memorization
in Neural Networks, USENIX Security (arXiv 1802.08232).

Random secrets are planted among the rows of one client, once or many times, and the run is done again. How much
likelier than other secrets does the model find them, and does it speak them out when asked?

Differences from the paper:
- The rank is that among ``others`` secrets that were not planted, drawn anew for each canary, not among all there are;
  so the exposure is at most $\\log_2$ of their number and one.
- All canaries of a run are in one client, each with a name of its own by which it is asked for.
"""

from __future__ import annotations

import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from fedfm.audit import measure
from fedfm.audit.case import Case, per_position
from fedfm.audit.finding import Finding
from fedfm.audit.inference import Aim, Inference, Sees
from fedfm.audit.jobs import Words
from fedfm.core import seeds
from fedfm.core.jobs import Loss
from fedfm.core.method import Paper
from fedfm.core.plan import Members
from fedfm.core.update import Member, Tensors
from fedfm.errors import ModelError, require
from fedfm.rounds import Rounds
from fedfm.tasks.chat import Chat
from fedfm.tasks.task import Task

if TYPE_CHECKING:
    from fedfm.models import Loaded


@dataclass(frozen=True)
class Canaries(Inference):
    """Exposure of a canary c: $\\log_2 |R| - \\log_2 \\text{rank}(c)$, where the secrets R are ordered by their loss.

    Args:
        repeats: how often a canary is planted; there are ``each`` of each kind.
        each: canaries planted equally often.
        digits: of a secret.
        others: secrets that were not planted, with which each is compared.
    """

    paper: ClassVar[Paper | None] = Paper(
        title="The Secret Sharer: Evaluating and Testing Unintended Memorization in Neural Networks",
        authors="Carlini, Liu, Erlingsson, Kos, Song",
        year=2019,
        venue="USENIX Security",
        arxiv="1802.08232",
    )
    id: ClassVar[str] = "canaries"
    aim: ClassVar[Aim] = "extraction"
    sees: ClassVar[Sees] = "model"
    tasks: ClassVar[tuple[str, ...]] = ("chat", "causal-lm")
    trains: ClassVar[bool] = True

    repeats: tuple[int, ...] = (1, 10, 100)
    each: int = 4
    digits: int = 6
    others: int = 255

    def __post_init__(self) -> None:
        require(self, "repeats", bool(self.repeats) and min(self.repeats) >= 1, "whole numbers of at least 1")
        for name in ("each", "digits", "others"):
            require(self, name, getattr(self, name) >= 1, "at least 1")

    def look(self, case: Case) -> tuple[Finding, ...]:
        birds = {count: [self.bird(case, count, number) for number in range(self.each)] for count in self.repeats}
        rows = [bird.row(case.federation.task) for count, some in birds.items() for bird in some for _ in range(count)]
        people = case.federation.members
        order = seeds.numpy_generator(case.seed, "audit", "canaries").permutation(len(people.ids))
        nest = sorted(people.ids)[int(order[0])]
        run = case.federation.on(Planted(people, nest, rows))
        tensors = run.result(Rounds(run, None, ()).run(False).state)
        return tuple(
            finding for count, some in birds.items() for finding in self.judged(case, tensors, some, _often(count))
        )

    def bird(self, case: Case, count: int, number: int) -> Bird:
        """A canary."""
        draw = seeds.numpy_generator(case.seed, "audit", "canary", count, number)
        letters = "".join(string.ascii_lowercase[int(at)] for at in draw.integers(26, size=6))
        return Bird(letters, self._digits(draw))

    def _digits(self, draw: Any) -> str:
        return " ".join(str(int(digit)) for digit in draw.integers(10, size=self.digits))

    def judged(self, case: Case, tensors: Tensors, birds: Sequence[Bird], often: str) -> tuple[Finding, Finding]:
        """What a model knows of canaries that were planted equally often."""
        task = case.federation.task
        bits, known = [], []
        for bird in birds:
            draw = seeds.numpy_generator(case.seed, "audit", "others", bird.name)
            rivals = [replace(bird, secret=self._digits(draw)) for _ in range(self.others)]
            rows = [one.row(task) for one in (bird, *(r for r in rivals if r.secret != bird.secret))]
            losses = per_position(case.read(Loss(tensors), rows))
            bits.append(exposure(losses))
            [said] = case.read(Words(tensors), rows[:1])
            if bool(said.right[span(said.wanted, bird.secret, case.reader.loaded)].all()):
                known.append((bird.secret, bird.secret))
        chance = sum(math.log2((self.others + 1) / rank) for rank in range(1, self.others + 2)) / (self.others + 1)
        mean, low, high = measure.positive(bits)
        most = math.log2(self.others + 1)
        spoken = measure.share(len(known), len(birds))
        return (
            Finding(
                self.id, f"exposure in bits, {often}", mean, low, min(high, most), chance=chance, trials=len(birds)
            ),
            Finding(
                self.id,
                f"secrets spoken out, {often}",
                *spoken,
                chance=10.0**-self.digits,
                trials=len(birds),
                examples=tuple(known[:3]),
            ),
        )


@dataclass(frozen=True)
class Bird:
    """A canary.

    Args:
        name: by which it is asked for.
        secret: what is to be kept.
    """

    name: str
    secret: str

    def row(self, task: Task) -> dict[str, Any]:
        """As a row of a task."""
        if isinstance(task, Chat):
            said = (f"What is the number of {self.name}?", self.secret)
            return {"messages": [{"role": r, "content": t} for r, t in zip(("user", "assistant"), said, strict=True)]}
        return {"text": f"The number of {self.name} is {self.secret}."}


@dataclass(frozen=True)
class Planted:
    """Members one of whom has more training rows.

    Args:
        members: the members.
        nest: which of them.
        birds: its further rows.
    """

    members: Members
    nest: str
    birds: Sequence[Mapping[str, Any]]

    @property
    def ids(self) -> Sequence[str]:
        return self.members.ids

    def member(self, id: str) -> Member:
        """The member, with the number of its rows as it is now."""
        return replace(self.members.member(id), examples=len(self.rows(id, "train")))

    def rows(self, id: str, split: str) -> Sequence[Mapping[str, Any]]:
        """The rows of a split."""
        own = self.members.rows(id, split)
        return [*own, *self.birds] if (id, split) == (self.nest, "train") else own

    def pooled(self) -> Members:
        return self.members.pooled()


def span(tokens: torch.Tensor, secret: str, loaded: Loaded) -> slice:
    """Where in a row's tokens the secret stands, which is the last that the row says.

    Raises:
        ModelError: the tokenizer does not give back what it was given.
    """

    def text(start: int, end: int) -> str:
        return str(loaded.tokenizer.decode(tokens[start:end], skip_special_tokens=True))

    count = len(tokens)
    starts = [at for at in range(count) if text(at, count).strip().rstrip(".") == secret]
    if not starts:
        raise ModelError(f"the tokenizer of {loaded.name} writes {text(0, count)!r} for a row that says {secret!r}")
    start = starts[-1]
    return slice(start, next(end for end in range(start + 1, count + 1) if secret in text(start, end)))


def exposure(losses: torch.Tensor) -> float:
    """$\\log_2 |R| - \\log_2 \\text{rank}$ of the first of these losses; those equal to it count half."""
    own, others = losses[0], losses[1:]
    rank = 1 + float((others < own).sum()) + float((others == own).sum()) / 2
    return math.log2(len(losses) / rank)


def _often(count: int) -> str:
    return "planted once" if count == 1 else f"planted {count} times"
