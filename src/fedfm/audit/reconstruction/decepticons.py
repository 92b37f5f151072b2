"""Decepticons: Fowl, Geiping, Reich, Wen, Czaja, Goldblum, Goldstein 2023, Decepticons: Corrupted Transformers Breach
Privacy in Federated Learning for Language Models, ICLR (arXiv 2201.12675).

The server hands out a model whose first feed-forward layer measures one direction of each token against many
thresholds. What two neighbouring thresholds received differs by the tokens in between: one token, most of the time,
whose embedding is then known, and with it the token. Attention is used to write a code of the row beside it.

Differences from the paper:
- Only the first block measures; in the paper the thresholds are dealt out over all blocks.
- The code is a mean over the row, and not the content of its first token, which of a BERT is the same in all rows.
  Where a token sees those before it alone, the code tells the order, too, so no embeddings of places are needed.
- A constant that enters the layer stands for its biases, and a layer norm makes the units steep, so that the weights
  that are read stay small: a client sends changes of them in 32 bits, where the paper has the gradient itself. Signs of
  the units alternate, so that they add little.
- In the last block every position is given the mean over all; the paper does so for masked words alone. Of a classifier
  else nothing but the first token would be seen.
- Thresholds are quantiles over tokens at random; the paper takes those of other text if it has some.
- Where no token was found, none is put by what is likely; how many rows there are, and the longest, is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from fedfm.audit import measure
from fedfm.audit.case import Case
from fedfm.audit.finding import Finding
from fedfm.audit.inference import Sees
from fedfm.audit.reconstruction.grouping import Item, by_code, by_prefix
from fedfm.audit.reconstruction.leak import Leak, leaks
from fedfm.audit.reconstruction.planted import SHARE, Measure, Planted, planted, signs
from fedfm.audit.reconstruction.reconstruction import Reconstruction, shared
from fedfm.audit.watch import Alter
from fedfm.core import seeds
from fedfm.core.method import Paper
from fedfm.core.update import Tensors
from fedfm.errors import RecipeError, require

CLOSE = 0.9
"""Correlation above which an embedding is taken for that of a token."""
EMPTY = 1e-5
"""Share of the largest difference between neighbouring thresholds below which nothing lies between them."""
SPREAD = 4
"""Pairs of thresholds at which one token may be seen, at most; all are full where a client added noise."""
CODED = 0.5
"""Length of the measured direction over the code; over what a token is known by it is 1."""
SAMPLE = (1000, 16)
"""Rows and tokens of each by which thresholds are found."""
ALIKE = 0.999
"""Cosine of two units' weights above which they measure the same."""


@dataclass(frozen=True)
class Decepticons(Reconstruction):
    """Units $W_i \\propto (-q_i, m)$ read $(1, x)$; of a token with $q_i < m^T x < q_{i+1}$,
    $(1, x) \\propto \\nabla W_i - \\nabla W_{i+1}$.

    Args:
        bins: thresholds, at most; never more than the layer has units.
    """

    paper: ClassVar[Paper | None] = Paper(
        title="Decepticons: Corrupted Transformers Breach Privacy in Federated Learning for Language Models",
        authors="Fowl, Geiping, Reich, Wen, Czaja, Goldblum, Goldstein",
        year=2023,
        venue="ICLR",
        arxiv="2201.12675",
    )
    id: ClassVar[str] = "decepticons"
    sees: ClassVar[Sees] = "dispatch"
    tasks: ClassVar[tuple[str, ...]] = ("causal-lm", "chat", "classify")
    trains: ClassVar[bool] = True

    bins: int = 100_000

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "bins", self.bins >= 2, "at least 2")

    def refusal(self, case: Case) -> str:
        if why := super().refusal(case):
            return why
        family, sent = self.family(case), set(shared(case))
        if family is None:
            return "it is written for models of the BERT and Llama families with two blocks or more"
        missing = next((name for name in family.needed if name not in sent), "")
        return f"it needs a server that sets {missing}, as in the space full" if missing else ""

    @staticmethod
    def family(case: Case) -> Planted | None:
        """What is planted in models like this one."""
        loaded = case.federation.bench.loaded
        return planted(loaded.architecture, loaded.model.config)

    def leaks(self, case: Case) -> list[Leak]:
        if found := leaks(case, self.clients, case.seen(case.round, self.alter(case))):
            return found
        raise RecipeError(f"{self.id}: no change of weights with a row behind it was seen in round {case.round}.")

    def alter(self, case: Case) -> Alter:
        """What is handed out: the same to all clients."""
        family = self.family(case)
        assert family is not None

        def plant(client: str, message: Tensors) -> Tensors:
            return family.weights(message, self.measured(case, family, message))

        return plant

    def measured(self, case: Case, family: Planted, start: Tensors) -> Measure:
        """What the layer measures: a direction at random, and thresholds between which as many tokens lie."""
        draw = seeds.generator(case.seed, "audit", self.id)
        direction, out = torch.zeros(family.width), torch.zeros(family.width)
        # Where no embedding of its position tells a token from the same one further on, its code must.
        direction[1:] = torch.randn(family.width - 1, generator=draw)
        direction[family.known] = F.normalize(direction[family.known], dim=0)
        direction[family.code] = F.normalize(direction[family.code], dim=0) * (CODED if family.causal else 0)
        out[family.known] = torch.randn(family.width, generator=draw)[family.known]
        out[family.known] -= out[family.known].mean()
        ids = torch.randint(int(family.config.vocab_size), SAMPLE, generator=draw)
        entering = family.entering(family.tokens(start, ids, torch.arange(SAMPLE[1]).expand(SAMPLE)))
        seen = (entering @ direction).flatten().sort().values
        count = min(self.bins, family.units)
        thresholds = torch.quantile(seen, torch.arange(count) / count)
        thresholds[0] -= seen[-1] - seen[0]  # Everything lies above the first.
        found = Measure(direction, out, thresholds, 1.0)
        some = seen[:: SAMPLE[1]]
        added = (found.steep * (some[:, None] - thresholds)).relu() @ signs(count)
        return Measure(direction, out, thresholds, SHARE / float(added.abs().max()))

    def look(self, case: Case) -> tuple[Finding, ...]:
        """Beside the rows, whether a client could notice."""
        return *super().look(case), self.noticed(case)

    def noticed(self, case: Case) -> Finding:
        """How many units of the layer a client could notice who compares their weights."""
        family = self.family(case)
        assert family is not None
        weight = self.alter(case)("", case.federation.layout.initial)[family.measured]
        return Finding(
            self.id,
            "units that the client could notice",
            *measure.share(len(alike(weight)), len(weight)),
            chance=1.0,
            trials=len(weight),
            notes="a unit that has the weights of another one but for one entry counts as noticed",
        )

    def recover(self, case: Case, leak: Leak) -> tuple[list[torch.Tensor], str]:
        family, lengths = self.family(case), [len(row) for row in leak.rows]
        assert family is not None
        items = self.items(case, leak)
        if family.causal:
            ids = torch.arange(int(family.config.vocab_size))
            rows = by_prefix(items, lengths, family.tokens(leak.exposed.start, ids, ids)[:, family.source])
        else:
            rows = by_code(items, lengths)
        return [
            torch.tensor(row, dtype=torch.long) for row in rows
        ], "the server changed the weights that it handed out"

    def found(self, case: Case, leak: Leak) -> torch.Tensor:
        """What entered the layer between neighbouring thresholds, ``[N, D]``, with entry 0 as 1."""
        family = self.family(case)
        assert family is not None
        weight = leak.exposed.start[family.measured].double()
        # What weight decay alone does in as many steps.
        left = (1 - leak.rate * case.reader.training.weight_decay) ** leak.steps - 1
        gradient = left * weight - leak.exposed.change[family.measured].double()
        count = min(self.bins, family.units)
        most = SPREAD * len(leak.rows) * max(map(len, leak.rows))
        return between(gradient[:count] * signs(count).double()[:, None], most)

    def items(self, case: Case, leak: Leak) -> list[Item]:
        """The tokens that are found in a change, each with its place where places have embeddings."""
        family, found = self.family(case), self.found(case, leak)
        assert family is not None
        start, mine = leak.exposed.start, _unit(found[:, family.known])
        ids = torch.arange(int(family.config.vocab_size))
        best, which = torch.full((len(found),), -1.0), torch.zeros(len(found), 2, dtype=torch.long)
        for place in range(1 if family.causal else max(map(len, leak.rows))):
            table = _unit(family.tokens(start, ids, torch.tensor(place))[:, family.known])
            score, token = (mine @ table.T).max(1)
            better = score > best
            best = torch.where(better, score, best)
            which[better] = torch.stack([token, torch.full_like(token, place)], 1)[better]
        sure = best > CLOSE
        ids, places = which[sure].T
        tokens = family.tokens(start, ids, places)
        codes, own = family.codes(found[sure].float(), tokens), tokens[:, family.source]
        known = zip(ids.tolist(), places.tolist(), codes, own, best[sure].tolist(), strict=True)
        return [Item(token, place, code, alone, score) for token, place, code, alone, score in known]


def between(rows: torch.Tensor, most: int) -> torch.Tensor:
    """What entered between neighbouring thresholds, ``[N, D]``, with entry 0 as 1.

    Args:
        rows: the gradients of the units, ``[bins, D]``.
        most: pairs of thresholds that are looked at, at most, those with the largest gradients between them; where
            there was none, nothing is.
    """
    apart = rows - torch.cat([rows[1:], torch.zeros_like(rows[:1])])
    size = apart[:, 0].abs()
    full = size.argsort(descending=True)[:most]
    full = full[size[full] > EMPTY * size.max().clamp_min(1e-30)]
    return apart[full] / apart[full, :1]


def alike(weight: torch.Tensor) -> list[int]:
    """Units that measure the same as another one, but for one entry.

    Args:
        weight: of the layer, ``[units, D]``.
    """
    # What the units share may be all but the entry in which they differ most, which stands for a bias.
    odd = int(weight.var(0).argmax())
    unit = F.normalize(torch.cat([weight[:, :odd], weight[:, odd + 1 :]], 1).float(), dim=1)
    near = (unit @ unit.T).fill_diagonal_(0.0).abs().max(1).values
    return (near > ALIKE).nonzero()[:, 0].tolist()


def _unit(rows: torch.Tensor) -> torch.Tensor:
    """Rows without their mean, of length 1: products are correlations."""
    rows = rows.float()
    return F.normalize(rows - rows.mean(1, keepdim=True), dim=1)
