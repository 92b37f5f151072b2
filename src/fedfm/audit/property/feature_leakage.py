"""Property inference: Melis, Song, De Cristofaro, Shmatikov 2019, Exploiting Unintended Feature Leakage in
Collaborative Learning, IEEE S&P (arXiv 1805.04049).

What a client sends tells of its rows also what the model is not to learn. The server has rows of its own, of which it
knows who has the property; it makes clients of them, lets each do what a client does in the round, and learns from
their uploads to tell how many of a client's rows have it.

Differences from the paper:
- Each value of a field of the rows is a property, and its share among a client's rows is learnt by ridge regression;
  the paper learns to tell batches with the property from those without, by random forests or logistic regression.
- The shadow clients have as many rows as the median client and mixed shares, drawn uniformly; they begin from what the
  server sent in the round, and do all that clients do, stages and noise, too. The paper adds up batches.
- One round is looked at, all clients at a time; the paper watches one over many, and its active attack, in which the
  attacker sends uploads of its own to make others show more, is left out.
- An upload is a sketch of fixed width and length 1, where the paper takes its largest values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import numpy as np
import torch

from fedfm.audit import measure
from fedfm.audit.case import Case
from fedfm.audit.finding import Finding
from fedfm.audit.inference import Aim, Inference, Sees
from fedfm.audit.watch import Exposed, Heard, Watched
from fedfm.core import seeds
from fedfm.core.method import Paper
from fedfm.core.update import Kind, Member
from fedfm.errors import RecipeError, require
from fedfm.store.clients import ClientStore

WIDTH = 2048
"""Numbers of a sketch."""
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Dealt:
    """Clients with these rows to train on, and no others."""

    dealt: Mapping[str, Sequence[Row]]

    @property
    def ids(self) -> list[str]:
        return sorted(self.dealt)

    def member(self, id: str) -> Member:
        return Member(id, len(self.dealt[id]))

    def rows(self, id: str, split: str) -> Sequence[Row]:
        return self.dealt[id] if split == "train" else ()

    def pooled(self) -> NoReturn:
        raise RecipeError("shadow clients are not pooled")


@dataclass(frozen=True)
class FeatureLeakage(Inference):
    """$\\hat p_{kv} = w_v \\cdot S(\\Delta_k) / \\lVert S(\\Delta_k) \\rVert + b_v$, learnt from shadow clients: which
    share of client k's rows has the value v in the field.

    Args:
        field: of the rows; its values are those in the server's rows.
        shadows: clients that the server makes up.
        values: most of them that the field may have.
    """

    paper: ClassVar[Paper | None] = Paper(
        title="Exploiting Unintended Feature Leakage in Collaborative Learning",
        authors="Melis, Song, De Cristofaro, Shmatikov",
        year=2019,
        venue="IEEE S&P",
        arxiv="1805.04049",
    )
    id: ClassVar[str] = "feature-leakage"
    aim: ClassVar[Aim] = "property"
    sees: ClassVar[Sees] = "uploads"
    trains: ClassVar[bool] = True

    field: str = "label"
    shadows: int = 64
    values: int = 20

    def __post_init__(self) -> None:
        require(self, "shadows", self.shadows >= 8, "at least 8")
        require(self, "values", self.values >= 2, "at least 2")

    def refusal(self, case: Case) -> str:
        if why := super().refusal(case):
            return why
        run = case.federation
        if run.method.kind(run.method.phases[-1]) is Kind.KNOWLEDGE:
            return f"what clients of {run.method.id} upload is no change of weights"
        if not len(run.public):
            return "the server has no rows to make shadow clients of. Set some aside: data.public: 0.2"
        if self.field not in run.public[0]:
            return f"the server's rows have no field {self.field!r}"
        found = len(self.known(case))
        return "" if 2 <= found <= self.values else f"the field {self.field!r} has {found} values in the server's rows"

    def known(self, case: Case) -> list[Any]:
        """The values of the field in the server's rows."""
        return sorted({row[self.field] for row in case.federation.public})

    def look(self, case: Case) -> tuple[Finding, ...]:
        """The probability that of two clients the one with more of a value than most scores higher, over all values."""
        known = self.known(case)
        clients, scores = self.scores(case, known)
        # Of two values one says all of the other.
        told = known[:1] if len(known) == 2 else known
        scores = scores[:, : len(told)]
        has, counted = above(np.array([shares(case.members.rows(c, "train"), self.field, told) for c in clients]))
        more, less = scores[has & counted], scores[~has & counted]
        if not len(more) or not len(less):
            raise RecipeError(f"{self.id}: all clients in round {case.round} have as much of each {self.field}.")
        area, trials = measure.auc(more.tolist(), less.tolist()), int(counted.sum())
        note = (
            f"{len(clients)} clients, values of {self.field}: {int(counted.any(0).sum())}; what is said of one client "
            "hangs together, so the interval is too narrow"
        )
        return (Finding(self.id, f"AUC of the share of a {self.field}", *area, chance=0.5, trials=trials, notes=note),)

    def scores(self, case: Case, known: Sequence[Any]) -> tuple[list[str], np.ndarray]:
        """The clients in the round, and how much more of each value each seems to have than the others, ``[C, V]``.

        Where uploads are summed unseen all look alike.
        """
        seen = case.watched.exposed()
        clients = [client for one in seen for client in one.clients]
        if not case.watched.single:
            return clients, np.zeros((len(clients), len(known)))
        from sklearn.linear_model import RidgeCV
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        x, y = self._learnt(case, known)
        learner = make_pipeline(StandardScaler(), RidgeCV(np.logspace(0, 6, 13))).fit(x, y)
        found = learner.predict(np.stack([sketched(one, case.seed) for one in seen]))
        return clients, found - found.mean(0)

    def _learnt(self, case: Case, known: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
        """Sketches of the shadow clients' uploads ``[S, WIDTH]`` and their shares ``[S, V]``."""
        people, method = self.people(case, known), case.federation.method
        # Its noise is that of other names, so nothing of the clients' own is known.
        run, watched, phase = case.federation.on(people), case.watched, method.phases[-1]
        sent = [heard.message for heard in watched.heard if heard.phase == phase]
        messages = {people.member(id): sent[at % len(sent)] for at, id in enumerate(people.ids)}
        x = {}
        for reply in run.connect(ClientStore()).ask(phase, case.round, messages):
            if reply.update is not None:
                one = Heard(phase, reply.member.id, messages[reply.member], reply.update)
                [exposed] = Watched(run, case.round, watched.before, heard=[one]).exposed()
                x[reply.member.id] = sketched(exposed, case.seed)
        y = [shares(people.rows(id, "train"), self.field, known) for id in x]
        return np.stack(list(x.values())), np.array(y)

    def people(self, case: Case, known: Sequence[Any]) -> Dealt:
        """Clients of the server's own rows, drawn with repetition, each with shares of its own."""
        draw = seeds.numpy_generator(case.seed, "audit", self.id)
        by = {value: [row for row in case.federation.public if row[self.field] == value] for value in known}
        count = int(np.median([case.members.member(c).examples for c in sorted(case.members.ids)]))
        dealt: dict[str, list[Row]] = {}
        for number in range(self.shadows):
            counts = draw.multinomial(count, draw.dirichlet(np.ones(len(known))))
            rows = [
                by[v][int(at)] for v, n in zip(known, counts, strict=True) for at in draw.integers(len(by[v]), size=n)
            ]
            dealt[f"shadow {number:04d}"] = [rows[int(at)] for at in draw.permutation(len(rows))]
        return Dealt(dealt)


def shares(rows: Sequence[Row], field: str, known: Sequence[Any]) -> list[float]:
    """The share of each value among rows, ``[V]``."""
    counts = Counter(row[field] for row in rows)
    return [counts[value] / max(1, len(rows)) for value in known]


def above(true: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Who has more of a value than the median client, and which values count: those of which not all have as much;
    both ``[C, V]``.

    Args:
        true: the shares, ``[C, V]``.
    """
    has = true > np.median(true, axis=0)
    return has, np.broadcast_to(has.any(0) & ~has.all(0), has.shape)


def sketched(seen: Exposed, seed: int) -> np.ndarray:
    """A change of weights as ``WIDTH`` numbers of length 1: each value is added, with a sign that is drawn, to one of
    them that is drawn (a count sketch), so that inner products stay as they are on average."""
    out = torch.zeros(WIDTH)
    for name in sorted(seen.change):
        flat = seen.change[name].detach().float().cpu().flatten()
        draw = seeds.generator(seed, "audit", "sketch", name)
        places = torch.randint(WIDTH, (len(flat),), generator=draw)
        out.index_add_(0, places, flat * (2.0 * torch.randint(2, (len(flat),), generator=draw) - 1))
    return (out / out.norm().clamp_min(torch.finfo(out.dtype).tiny)).numpy()
