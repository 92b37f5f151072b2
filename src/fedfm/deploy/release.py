"""What may leave a site: names of tensors and metrics, and the vectors and sums that hold no more than these.

- Each tensor's name matches a pattern. Of a marked name (``c:NAME``, ``topk:NAME``) the plain part counts.
- The vectors of ``topk`` and ``qsgd`` may leave when placeholders with allowed names stand beside them, with no more
  values than these have: packed is only what could have left as it was.
- The sums by which a model is scored on held-out rows may leave without being named, when the update holds nothing
  else: ``loss``, ``tokens``, ``examples``, one number each, and ``confusion``, a square.
- Metrics are numbers, and those of a report: loss, steps, examples, learning rate.

Values are not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fedfm.core import trees
from fedfm.core.update import Kind, Tensors, Update
from fedfm.wire import qsgd, topk

METRICS = frozenset({"loss", "steps", "examples", "learning_rate"})
"""Names of the metrics that may leave a site; each is one number."""

SUMS = frozenset({"loss", "tokens", "examples"})
"""Sums over held-out rows, of one number each, by which a model is scored. Classification adds ``CONFUSION``."""

CONFUSION = "confusion"
"""Examples by true and predicted class, ``[K, K]``."""

PACKED = {topk.VALUES: "topk", topk.POSITIONS: "topk", qsgd.LEVELS: "qsgd", qsgd.NORMS: "qsgd"}
"""Vectors in which encoding stages pack the values of all tensors, and the mark of the placeholders beside them."""


def strange_metric(update: Update) -> str | None:
    """The first metric that may not leave."""
    odd = (n for n, value in update.metrics.items() if n not in METRICS or not isinstance(value, (int, float)))
    return next(odd, None)


def scores(update: Update) -> bool:
    """Whether it holds nothing but the sums by which a model is scored."""
    return update.kind is Kind.KNOWLEDGE and all(_is_sum(n, t) for n, t in update.tensors.items())


def strange_tensor(tensors: Tensors, patterns: Sequence[str]) -> str | None:
    """The first tensor that may not leave.

    Args:
        tensors: of the update.
        patterns: of :mod:`fedfm.core.trees`.
    """
    patterns = tuple(patterns)
    room: dict[str, int] = {}

    def known(plain: str) -> bool:
        """Whether a placeholder stands for what may leave, or for what was packed before."""
        return PACKED[plain] in room if plain in PACKED else trees.matches(plain, patterns)

    # In this order, as qsgd packs the values of topk, and never the other way round.
    for mark in ("topk", "qsgd"):
        stand = {n: t for n, t in tensors.items() if n.startswith(f"{mark}:") and _is_placeholder(t)}
        room[mark] = sum(_count(name, tensor) for name, tensor in stand.items() if known(_plain(name)))
    # Packed vectors come last, so that the name of what they hold is given where that is what may not leave.
    for name in sorted(tensors, key=lambda name: _plain(name) in PACKED):
        plain = _plain(name)
        if plain in PACKED:
            # Only qsgd packs what was packed before.
            fits = name in (plain, f"qsgd:{plain}") and _count(name, tensors[name]) <= room[PACKED[plain]]
        else:
            fits = trees.matches(plain, patterns)
        if not fits:
            return name
    return None


def _plain(name: str) -> str:
    """A tensor's name without marks."""
    return name.rpartition(":")[2]


def _is_sum(name: str, tensor: torch.Tensor) -> bool:
    """Whether it is one of the sums by which a model is scored."""
    square = tensor.dim() == 2 and tensor.shape[0] == tensor.shape[1]
    return square if name == CONFUSION else name in SUMS and tensor.numel() == 1


def _is_placeholder(tensor: torch.Tensor) -> bool:
    """Whether it has the form of :func:`fedfm.wire.packing.placeholders`."""
    return tensor.dim() > 0 and tensor.shape[0] == 0


def _count(name: str, tensor: torch.Tensor) -> int:
    """Scalars in the tensor, or in that for which a placeholder stands."""
    return math.prod(tensor.shape[1:]) if ":" in name and _is_placeholder(tensor) else tensor.numel()
