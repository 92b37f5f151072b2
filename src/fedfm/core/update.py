"""What travels: a member (who), a message (what goes down) and an update (all that comes up)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

import torch

Tensors = Mapping[str, torch.Tensor]
"""Named tensors. LoRA factors keep their PEFT names: ``...q_proj.lora_A.weight`` ``[R, in]``."""

EMPTY: Mapping[str, float] = MappingProxyType({})


def _empty() -> Mapping[str, float]:
    return EMPTY


class Kind(StrEnum):
    """What the tensors of an update are, so that a stage knows what it may do to them."""

    DELTA = "delta"
    """Trained weights minus the weights that the client received: may be averaged, clipped, noised, sparsified."""
    WEIGHTS = "weights"
    """The trained weights themselves: may be averaged."""
    KNOWLEDGE = "knowledge"
    """Logits, prototypes, votes, counts, seeds with scalars: only the method knows how to combine them."""


@dataclass(frozen=True, slots=True)
class Member:
    """One client, as the server knows it. Cheap: made when needed, never held for the whole population.

    Args:
        id: name of the client, unique in the federation.
        examples: number of its training examples, $n_k$.
        profile: what the client says of its device (``rank``, ``memory_gb``, ...); empty for most methods.
    """

    id: str
    examples: int
    profile: Mapping[str, float] = field(default_factory=_empty, compare=False)


@dataclass(frozen=True, slots=True)
class Update:
    """Everything that leaves a client. Nothing travels beside it.

    Args:
        tensors: the payload, by name.
        weight: its weight in the mean; $n_k$ unless the method or a stage says otherwise.
        metrics: numbers for the report (training loss, steps); dropped when a stage hides single uploads.
        kind: what the tensors are.
        member: id of the sender, set by the link, never by the client.
    """

    tensors: Tensors
    weight: float = 1.0
    metrics: Mapping[str, float] = field(default_factory=_empty)
    kind: Kind = Kind.DELTA
    member: str = field(default="")
