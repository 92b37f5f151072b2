"""Fed-FA: Zhang, Chen, Zhou, Meng, Zhou, Sun 2023, Fed-FA: Theoretically Modeling Client Data Divergence for Federated
Language Backdoor Defense, NeurIPS 2023.

A backdoor in text changes the weights little, so that distances between uploads do not show it; it changes a client's
data much. How far data differ is estimated by distances in which a weight counts as much as the loss is curved along
it, and those whose data differ most are left out.

Differences from the paper:
- Written from its abstract and from what others report of it; the text was not at hand. How many are left out, and one
  after the other from the mean of those who are left, is ours.
- The curvature is the diagonal of the Fisher information at the round's start on the run's public rows; the paper makes
  up rows, as it has none, and corrects what these know of the embeddings. So embeddings of words that no public row has
  count for nothing here.
- Tensors that are no weights of the model's count with the mean curvature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedfm.core import trees
from fedfm.core.method import Paper
from fedfm.core.update import Kind, Tensors, Update
from fedfm.robust.geometry import away, distances
from fedfm.robust.leaving_out import LeavingOut
from fedfm.robust.sight import Sight


@dataclass(frozen=True)
class FedFA(LeavingOut):
    """Leave out $f$ uploads, one after the other, each time the one with the largest
    $I_k = \\sum_i H_i (x_{k,i} - \\bar x_i)^2$, where $\\bar x$ is the mean of those who are left and $H$ the diagonal
    of the curvature of the loss.

    A round costs one gradient for each public row. Of equally far uploads, the first by client id is left out.
    """

    paper: ClassVar[Paper | None] = Paper(
        title="Fed-FA: Theoretically Modeling Client Data Divergence for Federated Language Backdoor Defense",
        authors="Zhang, Chen, Zhou, Meng, Zhou, Sun",
        year=2023,
        venue="NeurIPS",
    )
    id: ClassVar[str] = "fed-fa"
    kinds: ClassVar[frozenset[Kind]] = frozenset({Kind.DELTA, Kind.WEIGHTS})

    def worst(self, updates: Sequence[Update], sight: Sight) -> list[str]:
        squares = self.divergences(updates, sight)
        left, out = list(range(len(updates))), []
        for _ in range(self.hostile):
            found = indicator(squares[left][:, left]).tolist()
            furthest = max(range(len(left)), key=lambda i: (found[i], -left[i]))
            out.append(updates[left.pop(furthest)].member)
        return out

    def divergences(self, updates: Sequence[Update], sight: Sight) -> torch.Tensor:
        """$\\sum_i H_i (x_{k,i} - x_{j,i})^2$ between C uploads, ``[C, C]``, with $H$ of mean 1."""
        roots = scaled(sight.curvature(), updates[0].tensors)
        return distances(
            [replace(u, tensors={n: trees.wide(t) * roots.get(n, 1.0) for n, t in u.tensors.items()}) for u in updates]
        )


def indicator(squares: torch.Tensor) -> torch.Tensor:
    """$I_k$ of C uploads, ``[C]``, from the divergences between them, ``[C, C]``."""
    return away(squares, torch.full((len(squares),), 1 / len(squares), dtype=squares.dtype)).square()


def scaled(curvature: Tensors, like: Tensors) -> Mapping[str, torch.Tensor]:
    """The roots of the curvature over its mean, of the tensors that are weights of the model, by name."""
    known = {n: c.to(like[n].device) for n, c in curvature.items() if n in like and like[n].shape == c.shape}
    total = sum(float(c.double().sum()) for c in known.values())
    mean = total / max(1, trees.count(known))
    return {n: (c / mean).sqrt() for n, c in known.items()} if mean else {}
