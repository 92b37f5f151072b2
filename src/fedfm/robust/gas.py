"""GAS: Liu et al. 2023, Byzantine-Robust Learning on Heterogeneous Data via Gradient Splitting, ICML 2023
(arXiv 2302.06079).

Where clients' data differ, honest uploads lie far from each other in their many coordinates and a hostile one hides
among them. Uploads are split into short pieces, and a robust rule is asked about each; whose pieces lie far from what
the rule makes of them is left out.

Differences from the paper:
- The paper's workers send gradients; here they send changes of the weights after some local steps.
- What is kept goes on with its weight, so the mean is weighted by examples unless a stage such as Clip makes weights
  equal; the paper's is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedfm import parts
from fedfm.core import trees
from fedfm.core.mean import WeightedMean
from fedfm.core.method import Paper
from fedfm.core.traits import Traits
from fedfm.core.update import Update
from fedfm.errors import RecipeError, require
from fedfm.robust.estimator import Estimator, aligned
from fedfm.robust.leaving_out import enough
from fedfm.robust.screen import Screen
from fedfm.robust.sight import Sight


@dataclass(frozen=True)
class GAS(Screen):
    """Keep the $n - f$ uploads with the lowest $s_k = \\sum_{q=1}^p \\lVert x_k^{(q)} - \\hat x^{(q)} \\rVert$, where
    $x^{(q)}$ are the coordinates of a random piece $q$ and $\\hat x^{(q)}$ is what the base rule makes of them.

    Args:
        hostile: $f$, how many uploads are left out of each round.
        pieces: $p$; no more than there are coordinates.
        base: the rule within a piece, as a recipe names it: an estimator or a screen.
    """

    paper: ClassVar[Paper | None] = Paper(
        title="Byzantine-Robust Learning on Heterogeneous Data via Gradient Splitting",
        authors="Liu, Chen, Lyu, Wu, Wu, Chen",
        year=2023,
        venue="ICML",
        arxiv="2302.06079",
    )
    id: ClassVar[str] = "gas"
    breaks: ClassVar[Traits] = frozenset()

    hostile: int = 1
    pieces: int = 1000
    base: parts.Spec = "median"

    def __post_init__(self) -> None:
        require(self, "hostile", self.hostile >= 0, "at least 0")
        require(self, "pieces", self.pieces >= 1, "at least 1")
        rule = self.rule
        if getattr(rule, "public", False) or isinstance(rule, GAS):
            raise RecipeError(f"GAS base must be a rule that looks at nothing but uploads, but is {self.base!r}.")

    @property
    def rule(self) -> Estimator | Screen:
        """The base rule."""
        return parts.make("robust", self.base, "GAS base")  # type: ignore[no-any-return]

    def screen(self, updates: Sequence[Update], sight: Sight) -> list[Update]:
        """The uploads with the lowest scores, as they came; of equal ones, the first by client id.

        Raises:
            RecipeError: no more than $f$ uploads arrived, or the base rule needs more.
        """
        aligned(updates)
        enough(self, self.hostile, len(updates))
        found = dict(zip((u.member for u in updates), self.scores(updates, sight).tolist(), strict=True))
        best = sorted(found, key=lambda member: (found[member], member))[: len(updates) - self.hostile]
        return [update for update in updates if update.member in best]

    def scores(self, updates: Sequence[Update], sight: Sight) -> torch.Tensor:
        """$s_k$ of C uploads, ``[C]``, float64."""
        rule, count = self.rule, trees.count(updates[0].tensors)
        found = torch.zeros(len(updates), dtype=torch.float64)
        if not count:
            return found
        order = torch.randperm(count, generator=sight.draw("pieces"))
        # In the order of its pieces each upload is gathered once, and a piece is then a slice.
        mixed = [
            torch.cat([trees.wide(t).flatten() for t in update.tensors.values()])[order.to(device)]
            for update in updates
            for device in [next(iter(update.tensors.values())).device]
        ]
        for pieces in zip(*(one.tensor_split(min(self.pieces, count)) for one in mixed), strict=True):
            own = [replace(u, tensors={"piece": piece}) for u, piece in zip(updates, pieces, strict=True)]
            made = rule(own) if isinstance(rule, Estimator) else WeightedMean()(rule.screen(own, sight))
            found += (torch.stack(pieces) - made.tensors["piece"]).norm(dim=1).double().cpu()
        return found
