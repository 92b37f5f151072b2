"""Jobs: what client work asks of its trainer.

``Method.local`` yields jobs and is sent their answers. It never runs a training loop itself, so the trainer is free to
answer one client at a time or many clients in one batched forward.

========== ================================================== =======================================
job        what is done on the client                         answer
========== ================================================== =======================================
Fit        gradient steps on its training examples            :class:`Fitted`
Loss       forward over a split, no gradient                  :class:`Scores`
Features   last hidden state of each example, pooled          tensor ``[N, D]``
Generate   text continued from prompts                        list of strings
Call       any function of its examples (counts, statistics)  what the function returns
========== ================================================== =======================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from fedfm.core.trees import Patterns
from fedfm.core.update import Tensors


class Term(Protocol):
    """Something added to the local loss, such as a proximal penalty."""

    def __call__(self, weights: Tensors, start: Tensors) -> torch.Tensor:
        """The scalar to add, differentiable in ``weights``.

        Args:
            weights: the tensors being trained.
            start: the same tensors before the first step, without gradient.
        """
        ...


@dataclass(frozen=True)
class Job:
    """Base of all jobs: the tensors of the space with which the model works; absent names take their initial value."""

    tensors: Tensors


@dataclass(frozen=True)
class Fit(Job):
    """Train ``tensors`` on the client's training split.

    Args:
        train: which names get gradients.
        terms: added to the task's loss at each step.
        max_steps: optimizer steps; ``None`` means what the run's training arguments say.
        purpose: names the random draws, so that two fits in one task differ.
    """

    train: Patterns = ("*",)
    terms: tuple[Term, ...] = ()
    max_steps: int | None = None
    purpose: str = "fit"


@dataclass(frozen=True)
class Fitted:
    """Answer to :class:`Fit`.

    Args:
        tensors: all tensors of the space after training; they share no memory with the model.
        steps: optimizer steps taken.
        examples: training examples seen, counted with repetition.
        loss: mean of the task's loss over the steps, in nats per supervised token or example.
    """

    tensors: Tensors
    steps: int
    examples: int
    loss: float


@dataclass(frozen=True)
class Loss(Job):
    """Score the model on a split of the client's data."""

    split: str = "train"


@dataclass(frozen=True)
class Scores:
    """Answer to :class:`Loss`.

    Args:
        loss: loss of each example in nats, summed over its supervised positions, ``[N]``.
        count: supervised positions of each example, ``[N]``.
        tally: sums from which the task computes its metrics; they add up over clients.
    """

    loss: torch.Tensor
    count: torch.Tensor
    tally: Tensors


@dataclass(frozen=True)
class Features(Job):
    """Hidden states of the last layer, averaged over the real positions of each example."""

    split: str = "train"


@dataclass(frozen=True)
class Generate(Job):
    """Continue each prompt, greedily; the task renders a prompt as the model expects it."""

    prompts: Sequence[str] = ()
    max_new_tokens: int = 64


@dataclass(frozen=True)
class Call(Job):
    """Run ``function(rows, generator)`` on the client's own rows (before tokenisation).

    Args:
        function: gets the rows of ``split`` and a generator seeded for this client, round and job.
        split: which rows.
    """

    tensors: Tensors = field(default_factory=dict)
    function: Callable[[Sequence[Mapping[str, Any]], torch.Generator], Any] = len  # type: ignore[assignment]
    split: str = "train"
