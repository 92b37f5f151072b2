"""A model of some blocks brought close to the whole model.

Letters in shapes: B examples of a batch, T tokens, D width, N real tokens, K classes or words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from fedfm.core import seeds
from fedfm.core.jobs import Fitted, Job
from fedfm.core.method import Client
from fedfm.core.trees import Patterns
from fedfm.tasks.task import Batch, collate
from fedfm.train.batches import batches
from fedfm.train.depth import shortened

if TYPE_CHECKING:
    from fedfm.train.trainer import Trainer

Seen = tuple[torch.Tensor, torch.Tensor]
"""What enters the block where models are compared ``[B, T, D]``, and logits ``[B, K]`` or ``[B, T, K]``."""


@dataclass(frozen=True)
class Align(Job):
    """Steps that lessen the distance of a short model from the whole one; see :func:`distance`.

    Both have ``tensors``, but what is trained has its initial values in the whole model: LoRA factors of zero product.
    Neither draws dropout. Answered by :class:`~fedfm.core.jobs.Fitted`, whose loss is the mean distance before each
    step.

    Args:
        short: the blocks of which the short model consists, rising.
        above: the block at whose entry hidden states are compared; it is in both models.
        weight: $\\lambda$, of the divergence.
        train: which names get gradients.
        max_steps: optimizer steps.
        purpose: names the random draws, so that two jobs in one task differ.
        split: of which the examples are.
        rate: factor on the run's learning rate; with 0 the distance is only measured.
    """

    short: tuple[int, ...]
    above: int
    weight: float
    train: Patterns
    max_steps: int
    purpose: str = "align"
    split: str = "public"
    rate: float = 1.0

    def run(self, trainer: Trainer, client: Client) -> Fitted:
        """Do the steps."""
        args, loaded = trainer.training, trainer.loaded
        examples = trainer.examples(client, self.split)
        trainer.space.load(self.tensors, self.patches)
        chosen = trainer.space.train_only(self.train)
        rate = trainer.learning_rate(client.round) * self.rate
        optimizer = trainer.optimizer(list(chosen.values()), rate)
        order = batches(
            list(map(len, examples)),
            args.per_device_train_batch_size,
            seeds.generator(trainer.seed, client.round, client.member.id, self.purpose, "batches"),
            args.group_by_length,
        )
        entry = attrgetter(loaded.architecture.blocks)(loaded.model)[self.above]
        total, seen = 0.0, 0
        trainer.mode(training=False)
        for _ in range(self.max_steps):
            group = list(islice(order, args.gradient_accumulation_steps))
            for places in group:
                batch = collate([examples[i] for i in places], trainer.pad, trainer.device)
                with torch.no_grad(), _replaced(chosen, trainer.space.initial):
                    whole = _forward(trainer, entry, batch)
                with shortened(loaded, self.short):
                    short = _forward(trainer, entry, batch)
                loss = distance(short, whole, batch.mask, self.weight) / len(group)
                loss.backward()
                total += float(loss.detach())
                seen += len(places)
            if args.max_grad_norm > 0:
                torch.nn.utils.clip_grad_norm_(chosen.values(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            trainer.pulse(0)
        memory = trainer.footprint(trainer.space.parameters, self.train)
        return Fitted(trainer.space.read(), self.max_steps, seen, total / max(1, self.max_steps), rate, memory)


def distance(short: Seen, whole: Seen, mask: torch.Tensor, weight: float) -> torch.Tensor:
    """$\\lVert h - h' \\rVert^2 / \\lVert h \\rVert^2 + \\lambda\\, KL(p \\Vert p')$ of the whole model's hidden
    states $h$ and distributions $p$ and the short one's, over real tokens; the divergence on average over tokens, or
    over examples where there is one distribution for each.

    Args:
        short: of the short model.
        whole: of the whole one.
        mask: of real tokens, ``[B, T]``.
        weight: $\\lambda$.
    """
    real = mask.bool()
    near, far = short[0][real].float(), whole[0][real].float()  # [N, D]
    apart = (near - far).square().sum() / far.square().sum()
    if not weight:
        return apart
    logs = [of[1][real] if of[1].dim() == 3 else of[1] for of in (short, whole)]
    mine, theirs = (functional.log_softmax(logits.float(), dim=-1) for logits in logs)  # [N, K] or [B, K]
    return apart + weight * functional.kl_div(mine, theirs, log_target=True, reduction="batchmean")


def _forward(trainer: Trainer, entry: nn.Module, batch: Batch) -> Seen:
    entered: list[torch.Tensor] = []

    def see(block: nn.Module, args: tuple[torch.Tensor, ...], named: dict[str, Any]) -> None:
        entered.append(args[0] if args else named["hidden_states"])

    handle = entry.register_forward_pre_hook(see, with_kwargs=True)
    try:
        with trainer.autocast():
            output = trainer.loaded.model(input_ids=batch.input_ids, attention_mask=batch.mask)
    finally:
        handle.remove()
    return entered[0], output.logits


@contextmanager
def _replaced(chosen: Mapping[str, nn.Parameter], values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Within it, parameters have other values."""
    before = {name: p.data for name, p in chosen.items()}
    for name, p in chosen.items():
        p.data = values[name].to(p)
    try:
        yield
    finally:
        for name, p in chosen.items():
            p.data = before[name]
