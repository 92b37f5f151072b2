"""Training by DP-SGD, with the per-example gradients and the optimizer of ``opacus``."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from fedfm.core import seeds, trees
from fedfm.core.jobs import Fit, Fitted, Job
from fedfm.core.method import Client
from fedfm.errors import FedfmError, ModelError
from fedfm.privacy.dp_sgd import DPSGD, batch, rate, steps
from fedfm.tasks.task import Example, collate

if TYPE_CHECKING:
    from opacus.optimizers import DPOptimizer

    from fedfm.train.trainer import Trainer

AGREE = 1e-3
"""How far the sum of the examples' gradients may be from the gradient of the batch, relative to its norm."""
AGREE_BF16 = 0.1
"""The same where the model computes in bfloat16."""


def fit(trainer: Trainer, privacy: DPSGD, secret: int, job: Fit, client: Client) -> Fitted:
    """Steps of DP-SGD.

    Args:
        trainer: whose model and arguments.
        privacy: clipping and noise.
        secret: seed of batches and noise, which nobody else may know.
        job: what to train.
        client: on whose examples.

    Raises:
        ModelError: the gradients of single examples cannot be told apart in this space.
    """
    from opacus.optimizers import DPOptimizer

    args, space = trainer.training, trainer.space
    examples = trainer.examples(client, job.split)
    space.load(job.tensors, job.patches)
    chosen = space.train_only(job.train)
    start = trees.clone(chosen)
    lr = trainer.learning_rate(client.round) * job.rate
    # By the number of rows, as it is accounted for, though some of them may hold nothing to learn.
    rows = client.member.examples
    size, share, count = batch(args, rows), rate(args, rows), steps(args, client.member)
    names = (client.round, client.member.id, job.purpose)
    draw = seeds.generator(secret, *names, "examples")
    noise = torch.Generator(trainer.device).manual_seed(seeds.derive(secret, *names, "noise"))
    optimizer = DPOptimizer(
        trainer.optimizer(list(chosen.values()), lr),
        noise_multiplier=privacy.noise_multiplier,
        max_grad_norm=privacy.max_grad_norm,
        expected_batch_size=size,
        generator=noise,
    )
    trainer.mode(training=True)
    unseen = True
    with torch.random.fork_rng(devices=trainer.cuda()), _per_example(space.model, chosen, trainer.task.rowwise):
        seeds.seed_torch(seeds.derive(trainer.seed, *names, "dropout"), trainer.device)
        for _ in range(count):
            drawn = torch.rand(len(examples), generator=draw) < share
            places = drawn.nonzero()[:, 0].split(args.per_device_train_batch_size) or (drawn.nonzero()[:, 0],)
            for at, part in enumerate(places):
                _gradients(trainer, job, [examples[i] for i in part], part, chosen)
                if unseen and len(part):
                    _see(chosen, len(part), AGREE_BF16 if trainer.bf16 else AGREE)
                    unseen = False
                _hold(chosen, job.masks or {})
                optimizer.signal_skip_step(at + 1 < len(places))
                if at + 1 < len(places):
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
            _step(optimizer, job, chosen, start)
            trainer.pulse(1)
    memory = trainer.footprint(space.parameters, job.train)
    return Fitted(space.read(), count, count * size, math.nan, lr, memory)


def _step(optimizer: DPOptimizer, job: Fit, chosen: Mapping[str, nn.Parameter], start: trees.Tensors) -> None:
    """One step with noise, and with the terms of the loss, which look at no example."""
    if optimizer.pre_step():
        for term in job.terms:
            added = term(chosen, start)
            if not added.requires_grad:  # It is a constant, as FedDyn's before it has seen a round.
                continue
            own = torch.autograd.grad(added, list(chosen.values()), allow_unused=True)
            for p, gradient in zip(chosen.values(), own, strict=True):
                if gradient is not None and p.grad is not None:
                    p.grad += gradient
        before = {name: p.detach().clone() for name, p in chosen.items() if name in (job.masks or {})}
        optimizer.original_optimizer.step()
        with torch.no_grad():
            for name, tensor in before.items():
                mask = (job.masks or {})[name].to(tensor.device, torch.bool)
                chosen[name].copy_(torch.where(mask, chosen[name], tensor))
    optimizer.zero_grad(set_to_none=True)


def _gradients(
    trainer: Trainer, job: Fit, examples: list[Example], places: torch.Tensor, chosen: Mapping[str, nn.Parameter]
) -> None:
    """Put the gradient of the mean loss of each example into ``grad_sample`` ``[B, ...]`` of the parameters."""
    if not examples:
        for p in chosen.values():
            p.grad_sample = p.new_zeros(0, *p.shape)  # type: ignore[attr-defined]
        return
    if not trainer.task.rowwise:
        each = (_loss(trainer, job, [one], at) for one, at in zip(examples, places.split(1), strict=True))
        own = [torch.autograd.grad(x, list(chosen.values()), allow_unused=True, materialize_grads=True) for x in each]
        for p, parts in zip(chosen.values(), zip(*own, strict=True), strict=True):
            p.grad_sample = torch.stack(parts)  # type: ignore[attr-defined]
            p.grad = p.grad_sample.sum(0)  # type: ignore[attr-defined]
        return
    _loss(trainer, job, examples, places).backward()
    for p in chosen.values():
        if p.grad is None:  # It took no part in the loss.
            p.grad_sample = p.new_zeros(len(examples), *p.shape)  # type: ignore[attr-defined]


def _loss(trainer: Trainer, job: Fit, examples: list[Example], places: torch.Tensor) -> torch.Tensor:
    """The mean losses of the examples, added up."""
    made = collate(examples, trainer.pad)
    if job.criterion is None:
        losses = trainer.losses(examples, made)
        return (losses.total / losses.count.clamp_min(1)).sum()
    return job.criterion(trainer.logits(examples, made), places).sum()


def _see(chosen: Mapping[str, nn.Parameter], count: int, agree: float) -> None:
    """See that each example has a gradient, and that they add up to that of the batch: else something was left out."""
    for name, p in chosen.items():
        found, whole = getattr(p, "grad_sample", None), p.grad if p.grad is not None else torch.zeros_like(p)
        known = isinstance(found, torch.Tensor) and len(found) == count
        if not known or (found.sum(0) - whole).norm() > agree * whole.norm() + 1e-6:  # type: ignore[union-attr]
            raise ModelError(
                f"the gradients of single examples in {name} cannot be told apart, so nothing can be promised about "
                "them. Choose the space lora, or leave privacy out."
            )


def _hold(chosen: Mapping[str, nn.Parameter], masks: trees.Tensors) -> None:
    """Leave the entries that may not change out of the gradients, so that they do not count in their norms."""
    for name, mask in masks.items():
        if name in chosen:
            chosen[name].grad_sample *= mask.to(chosen[name])  # type: ignore[attr-defined]


@contextmanager
def _per_example(model: nn.Module, chosen: Mapping[str, nn.Parameter], rowwise: bool) -> Iterator[None]:
    """Within it, a backward pass leaves gradients of single rows, where these are the examples."""
    from opacus.grad_sample import GradSampleHooks

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        try:
            hooks = GradSampleHooks(model, batch_first=True, loss_reduction="sum") if rowwise else None
        except NotImplementedError as error:  # what opacus raises for layers whose buffers would tell of examples
            raise ModelError(f"this model cannot be trained with privacy of examples: {error}") from error
        for p in chosen.values():
            p.grad_sample = None  # type: ignore[attr-defined]
        try:
            yield
        finally:
            if hooks is not None:
                hooks.remove_hooks()
            for p in chosen.values():
                for name in ("grad_sample", "summed_grad", "_forward_counter", "_current_grad_sample"):
                    vars(p).pop(name, None)
            for module in model.modules():
                for name in ("activations", "max_batch_len"):
                    vars(module).pop(name, None)


def refuse(job: Job) -> None:
    """See that nothing but a training of the run's length looks at training rows; of a job of a method's own nothing is
    known.

    Raises:
        FedfmError: the job does.
    """
    splits = getattr(job, "split", "train" if hasattr(job, "run") else "").split("+")
    if "train" in splits and not (isinstance(job, Fit) and splits == ["train"] and job.max_steps is None):
        raise FedfmError(f"{type(job).__name__} would look at training rows without noise, while dp-sgd protects them")
