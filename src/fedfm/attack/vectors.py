"""Several uploads as one matrix, for threats that compute with all of them at once.

Letters in shapes: C uploads, d coordinates of all tensors together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedfm.core.update import Tensors, Update
from fedfm.robust.estimator import aligned


def matrix(updates: Sequence[Update]) -> torch.Tensor:
    """All coordinates of each update, in float64, ``[C, d]``.

    Raises:
        BadUpdate: names or shapes differ.
    """
    aligned(updates)
    return torch.stack([torch.cat([t.double().flatten().cpu() for t in u.tensors.values()]) for u in updates])


def tensors(vector: torch.Tensor, like: Tensors) -> dict[str, torch.Tensor]:
    """A vector ``[d]`` under the names and shapes of ``like``, in its order."""
    parts = vector.split([t.numel() for t in like.values()])
    return {
        name: part.view(t.shape).to(t.dtype).to(t.device) for (name, t), part in zip(like.items(), parts, strict=True)
    }


def length(change: Tensors) -> torch.Tensor:
    """The norm of all tensors together, differentiable in them; of nothing but zeros its gradient is zero."""
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t) for t in change.values()]))
