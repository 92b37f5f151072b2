"""A low-rank classifier beside the head of a model: both read the same representation of an example.

Letters in shapes: N examples, B examples of a batch, D width of the representation, R rank, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from fedfm.core import seeds
from fedfm.core.jobs import Fit, Fitted, Job, Predict
from fedfm.core.method import Client
from fedfm.core.trees import Patterns
from fedfm.errors import ModelError
from fedfm.train.batches import batches

if TYPE_CHECKING:
    from fedfm.train.trainer import Trainer


class Adapter(NamedTuple):
    """Two thin linear layers: class scores $U D x$ of a representation $x$.

    Args:
        down: $D$, ``[R, D]``.
        up: $U$, ``[K, R]``.
    """

    down: torch.Tensor
    up: torch.Tensor

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """``[..., K]`` of representations ``[..., D]``."""
        return functional.linear(functional.linear(states, self.down), self.up)


@dataclass(frozen=True)
class FitBeside(Job):
    """Train a model by $(1 - \\mu)\\, CE(model) + \\mu\\, CE(adapter)$, while the adapter beside its head rests.

    Answered by :class:`~fedfm.core.jobs.Fitted`; batches and dropout are those of a ``Fit``.

    Args:
        adapter: beside the head.
        head: name of the tuned weight of the head.
        weight: $\\mu$.
        train: which names get gradients.
    """

    adapter: Adapter
    head: str
    weight: float
    train: Patterns

    def run(self, trainer: Trainer, client: Client) -> Fitted:
        """A ``Fit`` whose criterion sees the scores of both classifiers, one after the other."""
        targets = torch.stack([example.target for example in trainer.examples(client, "train")])
        adapter = Adapter(*(tensor.to(trainer.device) for tensor in self.adapter))

        def loss(scores: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            own, beside = scores.float().chunk(2, dim=1)  # [B, K] each
            wanted = targets[positions].to(scores.device)
            nats = (functional.cross_entropy(of, wanted, reduction="none") for of in (own, beside))
            return (1 - self.weight) * next(nats) + self.weight * next(nats)

        with _headed(trainer, self.head, lambda states, scores: torch.cat([scores, adapter(states)], dim=-1)):
            fit = Fit(self.tensors, train=self.train, criterion=loss, patches=self.patches)
            fitted: Fitted = trainer.answer(fit, client)
        return fitted


@dataclass(frozen=True)
class FitAdapter(Job):
    """Train the adapter beside the head by $\\mu\\, CE(adapter)$, while the model rests and draws no dropout.

    What the model's own scores would add to the loss is constant here. Each example goes through the model once.
    Answered by :class:`~fedfm.core.jobs.Fitted`, whose ``tensors`` are ``down`` and ``up``.

    Args:
        adapter: where it starts.
        head: name of the tuned weight of the head.
        weight: $\\mu$.
        max_steps: as in :class:`~fedfm.core.jobs.Fit`.
        purpose: names the random draws.
    """

    adapter: Adapter
    head: str
    weight: float
    max_steps: int | None = None
    purpose: str = "adapter"

    def run(self, trainer: Trainer, client: Client) -> Fitted:
        """Note what enters the head, then do the steps."""
        args, examples = trainer.training, trainer.examples(client, "train")
        with _headed(trainer, self.head, lambda states, scores: states):
            states = trainer.answer(Predict(self.tensors, patches=self.patches), client).to(trainer.device)  # [N, D]
        targets = torch.stack([example.target for example in examples]).to(trainer.device)
        adapter = Adapter(*(nn.Parameter(tensor.to(trainer.device, copy=True)) for tensor in self.adapter))
        rate = trainer.learning_rate(client.round)
        optimizer = trainer.optimizer(list(adapter), rate)  # type: ignore[arg-type]
        steps = trainer.steps(Fit({}, max_steps=self.max_steps), client, len(examples))
        order = batches(
            list(map(len, examples)),
            args.per_device_train_batch_size,
            seeds.generator(trainer.seed, client.round, client.member.id, self.purpose, "batches"),
            args.group_by_length,
        )
        total, seen = 0.0, 0
        for _ in range(steps):
            places = list(chain.from_iterable(islice(order, args.gradient_accumulation_steps)))
            loss = self.weight * functional.cross_entropy(adapter(states[places]), targets[places])
            loss.backward()
            if args.max_grad_norm > 0:
                torch.nn.utils.clip_grad_norm_(adapter, args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total += float(loss.detach())
            seen += len(places)
            trainer.pulse(1)
        after = {name: tensor.detach().cpu() for name, tensor in adapter._asdict().items()}
        return Fitted(after, steps, seen, total / steps, rate)


@contextmanager
def _headed(
    trainer: Trainer, name: str, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """Within it, the head gives what ``change`` makes of what enters it and of its class scores.

    A model that scores every token and picks one of them picks from the result, so it need not be known which.

    Raises:
        ModelError: the head is no linear layer.
    """
    weight = trainer.space.parameters.get(name)
    # A wrapper of peft shows the weight, too, but only the module that runs holds it.
    homes = [m for m in trainer.space.model.modules() if weight is not None and m._parameters.get("weight") is weight]
    if not (homes and isinstance(homes[0], nn.Linear)):
        found = type(homes[0]).__name__ if homes else "nothing"
        raise ModelError(
            f"an adapter stands beside a head that is a linear layer, but {name!r} of {trainer.loaded.name} is the "
            f"weight of {found}. Choose a model whose classifier ends in a linear layer."
        )

    def see(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return change(args[0], output)

    handle = homes[0].register_forward_hook(see)
    try:
        yield
    finally:
        handle.remove()
