"""What is run: who may take part, how they are drawn, how long and how they train."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from fedfm.core import seeds
from fedfm.core.update import Member
from fedfm.errors import RecipeError


class Members(Protocol):
    """The clients of a federation with their data, visited lazily."""

    @property
    def ids(self) -> Sequence[str]:
        """Names of the clients, each once."""
        ...

    def member(self, id: str) -> Member:
        """The member called ``id``."""
        ...

    def rows(self, id: str, split: str) -> Sequence[Mapping[str, Any]]:
        """The rows of a split (``train``, ``validation`` or ``test``) of a client; stays on the client."""
        ...

    def pooled(self) -> Members:
        """All clients' data in one client, each example in the split where it was."""
        ...


@dataclass(frozen=True)
class Profiled:
    """Members with a device profile: for each key, every client has one of the values, drawn by its name.

    Args:
        members: the members.
        choices: the values by key: ``rank`` of the LoRA factors, ``work`` as a factor on local steps, ``speed`` as
            tasks per unit of simulated time, ...
        seed: the run's seed.
    """

    members: Members
    choices: Mapping[str, Sequence[float]]
    seed: int

    @property
    def ids(self) -> Sequence[str]:
        return self.members.ids

    def member(self, id: str) -> Member:
        """The member called ``id``, with its profile."""
        draws = {key: seeds.derive(self.seed, "profile", key, id) % len(of) for key, of in self.choices.items()}
        profile = {key: self.choices[key][at] for key, at in draws.items()}
        return replace(self.members.member(id), profile=profile)

    def rows(self, id: str, split: str) -> Sequence[Mapping[str, Any]]:
        return self.members.rows(id, split)

    def pooled(self) -> Members:
        return self.members.pooled()


class Sampler(Protocol):
    """Who takes part in a round."""

    def sample(self, ids: Sequence[str], round: int, seed: int) -> list[str]:
        """Some of ``ids``, in order."""
        ...

    def expected(self, population: int) -> float:
        """Mean number of participants."""
        ...


@dataclass(frozen=True)
class Training:
    """Local training, in the spellings of Hugging Face's ``TrainingArguments``. All steps are per client and round.

    Args:
        max_steps: optimizer steps; -1 means ``num_train_epochs`` passes over the client's examples.
        num_train_epochs: local epochs, $E$, when ``max_steps`` is -1.
        per_device_train_batch_size: examples per forward, $B$.
        per_device_eval_batch_size: examples per forward when scoring.
        gradient_accumulation_steps: forwards per optimizer step.
        learning_rate: $\\eta$ at the first round.
        lr_scheduler_type: how the learning rate falls over the rounds; constant within a round.
        optim: ``adamw_torch`` or ``sgd``; its state is fresh in each round, as in FedAvg.
        weight_decay: decoupled for AdamW, L2 for SGD.
        adam_beta1: decay of AdamW's first moment.
        adam_beta2: decay of AdamW's second moment.
        adam_epsilon: AdamW's epsilon.
        max_grad_norm: gradients are clipped to this norm; 0 means no clipping.
        bf16: compute in bfloat16 by autocast; weights and updates stay float32. By default where the hardware has
            instructions for it.
        padding_free: compute no padding, and what a client's rows have in common at their beginning only once; the
            numbers are the same up to rounding.
        group_by_length: put examples of similar length into one batch.
        cache_frozen_blocks: where only upper blocks are tuned, keep what enters them for each example in memory instead
            of computing it anew in each step; not done where the lower blocks draw dropout.
    """

    max_steps: int = -1
    num_train_epochs: float = 1.0
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 16
    gradient_accumulation_steps: int = 1
    learning_rate: float = 3e-4
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    optim: Literal["adamw_torch", "sgd"] = "adamw_torch"
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    bf16: bool | None = None
    padding_free: bool = True
    group_by_length: bool = False
    cache_frozen_blocks: bool = True

    def __post_init__(self) -> None:
        for name in (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
        ):
            if getattr(self, name) < 1:
                raise RecipeError(f"training.{name} must be at least 1, but is {getattr(self, name)}.")
        if self.max_steps == 0 or self.max_steps < -1:
            raise RecipeError(
                f"training.max_steps must be at least 1, or -1 to train num_train_epochs; it is {self.max_steps}."
            )
        for name, least, below in (
            ("num_train_epochs", math.nextafter(0, 1), math.inf),
            ("learning_rate", math.nextafter(0, 1), math.inf),
            ("adam_epsilon", 0, math.inf),
            ("weight_decay", 0, math.inf),
            ("max_grad_norm", 0, math.inf),
            ("adam_beta1", 0, 1),
            ("adam_beta2", 0, 1),
        ):
            if not least <= getattr(self, name) < below:
                wanted = f"{'above' if least else 'at least'} 0 and {'finite' if below == math.inf else 'below 1'}"
                raise RecipeError(f"training.{name} must be {wanted}, but is {getattr(self, name)}.")

    def steps(self, examples: int) -> int:
        """Optimizer steps of one task of a client with this many training examples."""
        if self.max_steps > 0:
            return self.max_steps
        per_step = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return max(1, round(self.num_train_epochs * -(-examples // per_step)))


@dataclass(frozen=True)
class Plan:
    """What is run."""

    members: Members
    sampler: Sampler
    training: Training
    rounds: int
