"""Jobs of split learning: the model cut in three, each part run by who holds it.

The client holds the embedding and the head, the server the stack of blocks between them. An optimizer step goes through
the three parts and back:

=====================  ======  ==========================================================
job                    where   answer
=====================  ======  ==========================================================
Front                  client  :class:`Activations`: its next batch, embedded
Middle                 server  :class:`Pass`: what leaves the stack
Back                   client  :class:`Pass`: gradients of its head and of what left the stack
Middle with a gradient server  :class:`Pass`: gradients of the stack and of what entered it
FrontBackward          client  gradients of its embedding, by name
Step                   both    :class:`Stepped`: the part after an optimizer step
=====================  ======  ==========================================================

Nobody holds a graph while others work: a backward pass computes its forward again, with the same dropout. Together the
gradients are those of the whole model.

Letters in shapes: B examples of a batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fedfm.core import seeds, trees
from fedfm.core.jobs import Fit, Fitted, Job
from fedfm.core.method import Client
from fedfm.core.plan import Training
from fedfm.core.update import Tensors
from fedfm.errors import DataError
from fedfm.tasks.task import Batch, TaskModel, collate
from fedfm.train.batches import batches

if TYPE_CHECKING:
    from fedfm.train.trainer import Trainer

STACK: trees.Patterns = ("encoder", "transformer")
"""What the server holds, in the names of BERT's relatives; embedding and head are all the rest."""


@dataclass(frozen=True)
class Activations:
    """Answer to :class:`Front`.

    Args:
        hidden: what leaves the embedding, ``[B, T, D]``.
        lengths: real tokens of each example, ``[B]``.
        steps: optimizer steps that this client takes in the round.
    """

    hidden: torch.Tensor
    lengths: torch.Tensor
    steps: int


@dataclass(frozen=True)
class Pass:
    """Answer to :class:`Middle` and :class:`Back`.

    Args:
        hidden: ``[B, T, D]``: what leaves the stack, or the gradient with respect to what entered the part.
        gradient: with respect to the part's tensors, by name; empty for a forward pass.
        loss: mean over the batch's supervised positions in nats, where it is known.
        examples: examples of the batch.
    """

    hidden: torch.Tensor
    gradient: Tensors = field(default_factory=dict)
    loss: float = 0.0
    examples: int = 0


@dataclass(frozen=True)
class Stepped(Fitted):
    """Answer to :class:`Step`: ``tensors`` are those of the part alone.

    Args:
        moments: what the optimizer keeps, for the next step.
    """

    moments: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class Front(Job):
    """Embed the batch of a step.

    Args:
        step: number of the step in the round, from 0.
    """

    step: int = 0

    def run(self, trainer: Trainer, client: Client) -> Activations:
        batch, steps = _batch(trainer, client, self.step)
        _load(trainer, self.tensors)
        with torch.no_grad(), _training(trainer, client, "front", self.step):
            hidden = trainer.loaded.model.base_model.embeddings(input_ids=batch.input_ids)
        trainer.pulse(0)
        return Activations(hidden, batch.lengths, steps)


@dataclass(frozen=True)
class Back(Job):
    """The loss of a step's batch, from what left the stack, and its gradients.

    Args:
        hidden: what left the stack, ``[B, T, D]``.
        step: number of the step in the round, from 0.
    """

    hidden: torch.Tensor
    step: int = 0

    def run(self, trainer: Trainer, client: Client) -> Pass:
        from transformers.modeling_outputs import BaseModelOutput

        batch, _ = _batch(trainer, client, self.step)
        chosen = _load(trainer, self.tensors)
        hidden = self.hidden.to(trainer.device).requires_grad_()
        model: Any = trainer.loaded.model
        body = _Given(BaseModelOutput(last_hidden_state=hidden))
        with _training(trainer, client, "back", self.step), _replaced(model, model.base_model_prefix, body):
            losses = trainer.task.losses(TaskModel(model), batch)
        loss = losses.total.sum() / losses.count.sum()
        loss.backward()
        assert hidden.grad is not None
        trainer.pulse(0)
        return Pass(hidden.grad, _gradients(chosen), float(loss.detach()), len(batch.lengths))


@dataclass(frozen=True)
class FrontBackward(Job):
    """Gradients of the embedding, from the gradient with respect to what left it.

    Args:
        gradient: ``[B, T, D]``.
        step: number of the step in the round, from 0.
    """

    gradient: torch.Tensor
    step: int = 0

    def run(self, trainer: Trainer, client: Client) -> Tensors:
        batch, _ = _batch(trainer, client, self.step)
        chosen = _load(trainer, self.tensors)
        with _training(trainer, client, "front", self.step):
            hidden = trainer.loaded.model.base_model.embeddings(input_ids=batch.input_ids)
        hidden.backward(self.gradient.to(hidden))
        trainer.pulse(1)  # the client's part of the step ends here
        return _gradients(chosen)


@dataclass(frozen=True)
class Middle(Job):
    """The stack on a client's batch: forward, or, with a gradient, forward and backward.

    Args:
        hidden: what entered the stack, ``[B, T, D]``.
        lengths: real tokens of each example, ``[B]``.
        gradient: of what left the stack, ``[B, T, D]``; ``None`` asks for what leaves it.
        purpose: names the dropout; the same in both directions.
        step: number of the step in the round, from 0.
    """

    hidden: torch.Tensor
    lengths: torch.Tensor
    gradient: torch.Tensor | None = None
    purpose: str = "stack"
    step: int = 0

    def run(self, trainer: Trainer, client: Client) -> Pass:
        chosen = _load(trainer, self.tensors)
        entered = self.hidden.to(trainer.device)
        back = self.gradient is not None
        entered = entered.detach().requires_grad_(back)
        mask = (torch.arange(entered.shape[1]) < self.lengths.cpu()[:, None]).long().to(trainer.device)  # [B, T]
        base: Any = trainer.loaded.model.base_model
        with (
            torch.set_grad_enabled(back),
            _training(trainer, client, self.purpose, self.step),
            _replaced(base, "embeddings", _Given(entered)),
        ):
            left = base(inputs_embeds=entered, attention_mask=mask).last_hidden_state
        if self.gradient is None:
            return Pass(left)
        left.backward(self.gradient.to(left))
        assert entered.grad is not None
        return Pass(entered.grad, _gradients(chosen))


@dataclass(frozen=True)
class Step(Job):
    """An optimizer step on a part of the model, by the run's training arguments.

    Args:
        gradient: by name; a tensor without one stays as it is.
        moments: what the optimizer kept from the step before; empty before the first. Other names are left alone.
    """

    gradient: Tensors = field(default_factory=dict)
    moments: Tensors = field(default_factory=dict)

    def run(self, trainer: Trainer, client: Client) -> Stepped:
        rate = trainer.learning_rate(client.round)
        tensors, moments = stepped(self.tensors, self.gradient, self.moments, trainer.training, rate)
        return Stepped(tensors, steps=1, examples=0, loss=0.0, learning_rate=rate, moments=moments)


def stepped(
    weights: Tensors, gradient: Tensors, moments: Tensors, training: Training, rate: float
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights and moments after one step of SGD or of AdamW; nothing is changed in place.

    SGD: $w \\leftarrow w - \\eta (g + \\lambda w)$. AdamW, in step t:
    $m \\leftarrow \\beta_1 m + (1 - \\beta_1) g$, $v \\leftarrow \\beta_2 v + (1 - \\beta_2) g^2$,
    $w \\leftarrow (1 - \\eta \\lambda) w - \\eta \\hat m / (\\sqrt{\\hat v} + \\epsilon)$ with
    $\\hat m = m / (1 - \\beta_1^t)$ and $\\hat v = v / (1 - \\beta_2^t)$.

    Args:
        weights: by name.
        gradient: by name; clipped to ``max_grad_norm`` first.
        moments: $m$ and $v$ under the marks ``m`` and ``v``, and ``at:t``; other names are left alone.
        training: the optimizer's settings.
        rate: $\\eta$.
    """
    norm = trees.norm(gradient)
    if 0 < training.max_grad_norm < norm:
        gradient = trees.scale(gradient, training.max_grad_norm / norm)
    held = {n: weights[n] for n in gradient}
    decay = training.weight_decay
    if training.optim == "sgd":
        return {**weights, **{n: w - rate * (gradient[n] + decay * w) for n, w in held.items()}}, {}
    one, two = training.adam_beta1, training.adam_beta2
    t = 1 + int(moments.get("at:t", 0))
    before = {slot: trees.marked(slot, moments) for slot in "mv"}
    zero = torch.zeros(())
    m = {n: one * before["m"].get(n, zero) + (1 - one) * g for n, g in gradient.items()}
    v = {n: two * before["v"].get(n, zero) + (1 - two) * g.square() for n, g in gradient.items()}
    after = {
        n: (1 - rate * decay) * w - rate / (1 - one**t) * m[n] / ((v[n] / (1 - two**t)).sqrt() + training.adam_epsilon)
        for n, w in held.items()
    }
    return {**weights, **after}, {**trees.mark("m", m), **trees.mark("v", v), "at:t": torch.tensor(t)}


class _Given(nn.Module):
    """Stands for a part of the model that somebody else ran.

    Args:
        output: what it gives.
    """

    def __init__(self, output: Any) -> None:
        super().__init__()
        self._output = output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._output


@contextmanager
def _replaced(parent: nn.Module, name: str, stand_in: nn.Module) -> Iterator[None]:
    """Within it, another module stands in a module's place."""
    part = getattr(parent, name)
    setattr(parent, name, stand_in)
    try:
        yield
    finally:
        setattr(parent, name, part)


@contextmanager
def _training(trainer: Trainer, client: Client, part: str, step: int) -> Iterator[None]:
    """Within it, the model trains, with the dropout of this client, part and step."""
    if not trainer.loaded.model.training:  # a step calls this many times, and it walks all modules
        trainer.loaded.model.train()
    cuda = [trainer.device] if trainer.device.type == "cuda" else []
    bf16 = torch.autocast(trainer.device.type, dtype=torch.bfloat16, enabled=trainer.bf16)
    with torch.random.fork_rng(devices=cuda), bf16:
        seed = seeds.derive(trainer.seed, client.round, client.member.id, "split", part, step)
        seeds.seed_torch(seed, trainer.device)
        yield


def _batch(trainer: Trainer, client: Client, step: int) -> tuple[Batch, int]:
    """The batch of a step, as a ``Fit`` of the same client and round would draw it, and how many steps there are."""
    examples = trainer.encoded(client.member.id, "train")
    if not examples:
        raise DataError(f"client {client.member.id!r} has no training example from which there is something to learn")
    args, job = trainer.training, Fit({})
    order = batches(
        list(map(len, examples)),
        args.per_device_train_batch_size,
        seeds.generator(trainer.seed, client.round, client.member.id, job.purpose, "batches"),
        args.group_by_length,
    )
    forwards = args.gradient_accumulation_steps
    places = [i for chunk in islice(order, step * forwards, (step + 1) * forwards) for i in chunk]
    batch = collate([examples[i] for i in places], trainer.loaded.tokenizer.pad_token_id, trainer.device)
    return batch, trainer.steps(job, client, len(examples))


@torch.no_grad()
def _load(trainer: Trainer, tensors: Tensors) -> dict[str, nn.Parameter]:
    """The parameters called as ``tensors``, with these values, ready for gradients.

    The other parts keep whatever they hold: they do not run.
    """
    chosen = {name: trainer.space.parameters[name] for name in tensors}
    for parameter in trainer.space.parameters.values():
        parameter.requires_grad_(False)
        parameter.grad = None
    for name, parameter in chosen.items():
        parameter.copy_(tensors[name])
        parameter.requires_grad_()
    return chosen


def _gradients(chosen: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Their gradients, where a backward pass left one; taken away from the model."""
    found = {name: p.grad for name, p in chosen.items() if p.grad is not None}
    for parameter in chosen.values():
        parameter.grad = None
    return found
