"""The weighted mean of a stream of updates, with memory for one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedfm.core import trees
from fedfm.core.traits import Part
from fedfm.core.update import Kind, Update
from fedfm.errors import BadUpdate, NoUpdates


@dataclass(frozen=True)
class WeightedMean(Part):
    """$\\sum_k p_k x_k$ with $p_k = n_k / \\sum_j n_j$ over the updates that arrive.

    Kept as a running mean, $m \\leftarrow m + (n_k / N_k)(x_k - m)$ with $N_k$ the weight so far, in float32 or wider:
    one update in memory whatever the cohort, and the mean of one update is that update, bit for bit.
    """

    id: ClassVar[str] = "mean"

    def __call__(self, updates: Iterable[Update]) -> Update:
        mean: dict[str, torch.Tensor] = {}
        dtypes: dict[str, torch.dtype] = {}
        weight, kind = 0.0, Kind.DELTA
        for update in updates:
            if not update.weight:
                continue
            shapes = {name: tensor.shape for name, tensor in update.tensors.items()}
            if weight and shapes != {name: tensor.shape for name, tensor in mean.items()}:
                raise BadUpdate(f"{update.member!r} sent other names or shapes than the clients before it")
            weight += update.weight
            share = update.weight / weight
            for name, tensor in update.tensors.items():
                wide = trees.wide(tensor)
                if name in mean:
                    mean[name].lerp_(wide.to(mean[name].dtype), share)
                    if tensor.dtype != dtypes[name]:
                        # Else whoever comes first would choose in which precision all others count.
                        dtypes[name] = mean[name].dtype
                else:
                    mean[name] = wide.clone() if wide is tensor else wide
                    dtypes[name] = tensor.dtype
                del tensor, wide
            kind = update.kind
            del update  # the next one may need its memory
        if not weight:
            raise NoUpdates("nobody's update could be used")
        return Update({n: t.to(dtypes[n]) for n, t in mean.items()}, weight=weight, kind=kind, member="mean")
