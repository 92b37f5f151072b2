"""CerP: Lyu, Han, Wang, Liu, Wang, Liu, Zhang 2023, Poisoning with Cerberus: Stealthy and Colluded Backdoor Attack
against Federated Learning, AAAI 2023.

Three heads of one backdoor. Hostile clients tune their trigger, within a bound, to what the received model answers
anyway, so that little must be learnt; each learns its part of it near the model that it would have had without any
trigger; and each goes another way than those before it. So an upload is neither far from honest ones nor like another.

Differences from the paper:
- Written from its abstract, from what others report of it and from what the authors' code does; the text was not at
  hand. Weights and the share of poisoned rows are those of that code for CIFAR-100.
- The trigger is of words, where the paper's are pixels and columns of a table. A gradient does not lead from word to
  word, so words are tried out one by one, and the bound is the number of words that differ from the first trigger.
- It is tuned to each received model anew, from the first trigger, and so it is when success is counted: the model's own
  trigger is asked for, as the attacker receives the model, too. The paper's goes on from round to round.
- Alike are changes of the received weights, all tensors as one, as defences compare them; in the authors' code whole
  weights, tensor by tensor. A change counts as a tenth as long as the other at least, as without any the first step
  would be thrown anywhere.
- Learning rate and number of steps are those of the run; the authors' attackers train longer and with a smaller rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, ClassVar

import torch

from fedfm.attack.dba import DBA
from fedfm.attack.rows import gives
from fedfm.attack.threat import Circle, Hostile, Knowledge, Row, Rows
from fedfm.attack.vectors import length
from fedfm.core import trees
from fedfm.core.jobs import Fit, Fitted, Job, Loss, Scores
from fedfm.core.method import Client, Paper
from fedfm.core.traits import Trait, Traits
from fedfm.core.update import Tensors
from fedfm.errors import require

if TYPE_CHECKING:
    from fedfm.train.trainer import Trainer

TRIGGER = "@trigger"
"""Under which the first of a round tells the others how it tuned the trigger."""


@dataclass(frozen=True)
class Close:
    """$\\alpha \\lVert w - \\hat w \\rVert_2$.

    Args:
        point: $\\hat w$.
        factor: $\\alpha$.
    """

    point: Tensors
    factor: float

    def __call__(self, weights: Tensors, start: Tensors) -> torch.Tensor:
        return self.factor * length({name: w - self.point[name].to(w.device) for name, w in weights.items()})


@dataclass(frozen=True)
class Apart:
    """$\\beta \\sum_j \\cos(w - w^0, \\Delta_j)$ with the weights $w^0$ before the first step.

    Args:
        others: $\\Delta_j$, what other clients changed.
        factor: $\\beta$.
    """

    others: Sequence[Tensors]
    factor: float

    def __call__(self, weights: Tensors, start: Tensors) -> torch.Tensor:
        change = {name: w - start[name] for name, w in weights.items()}
        far, total = length(change), torch.zeros((), device=next(iter(change.values())).device)
        for other in self.others:
            one = {name: other[name].to(t.device) for name, t in change.items()}
            long = length(one)
            along = torch.stack([(change[name] * t).sum() for name, t in one.items()]).sum()
            total = total + along / (far.clamp_min(0.1 * long) * long).clamp_min(1e-30)
        return self.factor * total


@dataclass(frozen=True)
class Collude(Job):
    """The training of a hostile client among its colluders.

    Args:
        fit: the honest training.
        threat: the attack.
        who: the client.
    """

    fit: Fit
    threat: CerP
    who: Hostile

    def run(self, trainer: Trainer, client: Client) -> Fitted:
        """Tune the trigger unless another one has, train honestly, train with the trigger, and tell the others."""
        fit, who, told = self.fit, self.who, self.who.circle.told
        if TRIGGER not in told:
            told[TRIGGER] = self.threat.tuned(trainer, client, fit, who.circle.ids)
        own = trainer.data.rows(who.id, "train")
        tuned = replace(self.threat, trigger=told[TRIGGER])
        # Random numbers are copied, as this may be done again.
        poisoned = tuned.rows(own, replace(who, draw=who.draw.clone_state()))
        encode = trainer.task.encode
        with trainer.given(client, encode(own, trainer.loaded), fit.split):
            honest: Fitted = trainer.answer(fit, client)
        changes = [told[id] for id in who.circle.ids[: who.rank] if id in told]
        terms = (*fit.terms, Close(honest.tensors, self.threat.alpha), Apart(changes, self.threat.beta))
        with trainer.given(client, encode(poisoned, trainer.loaded), fit.split):
            fitted: Fitted = trainer.answer(replace(fit, terms=terms), client)
        trained = trees.select(fitted.tensors, fit.train)
        told[who.id] = trees.subtract(trained, {n: fit.tensors.get(n, client.space.initial[n]) for n in trained})
        return fitted


@dataclass(frozen=True)
class Ask(Job):
    """How a model answers to rows with the trigger that is tuned to it.

    Args:
        loss: asks for the answers to the rows of a split with the first trigger.
        threat: the attack.
        circle: of the hostile clients.
        split: that those rows are made of.
    """

    loss: Loss
    threat: CerP
    circle: Circle
    split: str

    def run(self, trainer: Trainer, client: Client) -> Scores:
        """Tune the trigger unless that was done for another client, and ask with it."""
        told = self.circle.told
        if TRIGGER not in told:
            told[TRIGGER] = self.threat.tuned(trainer, client, self.loss, self.circle.ids)
        rows = replace(self.threat, trigger=told[TRIGGER]).probe(trainer.data.rows(client.member.id, self.split))
        with trainer.given(client, trainer.task.encode(rows, trainer.loaded), self.loss.split):
            scores: Scores = trainer.answer(self.loss, client)
        return scores


@dataclass(frozen=True, kw_only=True)
class CerP(DBA):
    """As :class:`~fedfm.attack.dba.DBA`, with the trigger $t$ of least $L(x + t, y^*)$ at the received weights among
    those with $|t - t_0| \\le \\epsilon$, and with
    $L_{class} + \\alpha \\lVert w - \\hat w_k \\rVert_2 + \\beta \\sum_{j<k} \\cos(w - w^0, w_j - w^0)$
    for the loss of the hostile client $k$, where $\\hat w_k$ is what it would have learnt without a trigger.

    Args:
        changes: $\\epsilon$, words of the trigger that may be others than at first.
        candidates: words that may take their place.
        tries: rows of hostile clients on which triggers are tried out; each costs a forward for each candidate, word of
            the trigger and change.
        alpha: $\\alpha$.
        beta: $\\beta$.
    """

    paper: ClassVar[Paper | None] = Paper(
        title="Poisoning with Cerberus: Stealthy and Colluded Backdoor Attack against Federated Learning",
        authors="Lyu, Han, Wang, Liu, Wang, Liu, Zhang",
        year=2023,
        venue="AAAI",
    )
    id: ClassVar[str] = "cerp"
    needs: ClassVar[Traits] = frozenset({Trait.ONE_FIT})

    share: float = 5 / 64
    changes: int = 2
    candidates: tuple[str, ...] = ("mb", "qx", "vz", "jw", "kd", "xj", "zq", "wv")
    tries: int = 8
    alpha: float = 1e-4
    beta: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "changes", self.changes >= 0, "at least 0")
        words = all(len(word.split()) == 1 for word in self.candidates)
        require(self, "candidates", bool(self.candidates) and words, "single words, at least one")
        require(self, "tries", self.tries >= 1, "at least 1")
        require(self, "alpha", 0 <= self.alpha < float("inf"), "at least 0 and finite")
        require(self, "beta", 0 <= self.beta < float("inf"), "at least 0 and finite")

    @property
    def knowledge(self) -> Knowledge:
        return "colluding"

    def job(self, job: Job, who: Hostile) -> Job:
        return Collude({}, job, self, who) if isinstance(job, Fit) and job.split == "train" else job

    def trial(self, job: Job, circle: Circle) -> Job:
        return Ask({}, job, self, circle, job.split) if isinstance(job, Loss) else job

    def tuned(self, trainer: Trainer, client: Client, at: Job, ids: Sequence[str]) -> str:
        """The words of the trigger, changed one after the other as long as that brings the loss down.

        Args:
            trainer: has the model and all clients' rows.
            client: in whose place rows are tried out.
            at: a job with the weights of the model.
            ids: names of the hostile clients.
        """
        rows = self.tried([trainer.data.rows(id, "train") for id in ids])
        job = Loss(at.tensors, split="train", patches=at.patches, blocks=at.blocks)

        def loss(words: Sequence[str]) -> float:
            asked = replace(self, trigger=" ".join(words)).probe(rows)
            with trainer.given(client, trainer.task.encode(asked, trainer.loaded), job.split):
                return float(trainer.answer(job, client).loss.double().mean())

        first = self.trigger.split()
        best = (loss(first), tuple(first))
        for _ in range(self.changes if rows else 0):
            now = best[1]
            tried = [
                (*now[:at], word, *now[at + 1 :])
                for at, old in enumerate(now)
                for word in self.candidates
                if word not in now and old == first[at]
            ]
            best, before = min([best, *((loss(words), words) for words in tried)], key=lambda found: found[0]), best
            if best is before:
                break
        return " ".join(best[1])

    def tried(self, of: Sequence[Rows]) -> list[Row]:
        """The first rows that have another answer than the wanted one, from each client in turn."""
        others = [[row for row in rows if not gives(row, self.target, self.answer)] for rows in of]
        turns = chain.from_iterable(zip_longest(*others))
        return [row for row in turns if row is not None][: self.tries]
