"""The work of a client done over by the server on rows that it makes up, to compare what comes of it with what came.

Letters in shapes: B rows, T tokens, D width, K classes, C channels, H and W height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from fedfm.audit.case import Case
from fedfm.audit.reconstruction.leak import Leak, Work
from fedfm.core.traits import Trait
from fedfm.core.update import Tensors
from fedfm.tasks.task import Batch, TaskModel
from fedfm.train.trainer import Trainer
from fedfm.wire.clip import Clip

UNROLLED = 8
"""Most local steps that are done over one by one, as each keeps its graph in memory."""
NEAR = 1e-3
"""How close to its bound the norm of a change is that was cut to it."""


@dataclass
class Rehearsal:
    """Local work on made-up rows, differentiable in them; of a task with classes.

    Text is made up as what comes out of the table of token embeddings, so the gradient of that table, which tells
    tokens and no order, is not among what is compared.

    What a server receives of one step of SGD is the gradient, and of several steps what the same steps make of the
    same rows. AdamW divides by its own moments, DP-SGD clips each row and adds noise, and what was clipped as a whole
    has lost its length: then the direction of the gradient at the start is compared, and nothing else.

    Args:
        reader: has the model.
        leak: what was received; its tensors are loaded.
        stepwise: whether the local steps are done over one by one.
        scaled: whether what was received has the length of a gradient.
        sparse: whether clients left out coordinates, which are then not compared.
    """

    reader: Trainer
    leak: Leak
    stepwise: bool
    scaled: bool
    sparse: bool

    @property
    def model(self) -> Any:
        """The whole model."""
        return self.reader.loaded.model

    @cached_property
    def words(self) -> nn.Embedding | None:
        """The table of token embeddings; none where rows are images."""
        return None if self.leak.rows[0].values is not None else self.model.get_input_embeddings()

    @cached_property
    def names(self) -> list[str]:
        """Of the tensors that are compared."""
        tables = {id(p) for p in self.words.parameters()} if self.words is not None else set()
        own = self.reader.space.parameters
        return [n for n in self.leak.exposed.change if n in own and id(own[n]) not in tables]

    @cached_property
    def signal(self) -> list[torch.Tensor]:
        """What was received, as a gradient: $-\\Delta / \\eta$, without the decay $\\lambda \\theta$ of each step where
        these are not done over one by one."""
        own, decay = self.reader.space.parameters, self.reader.training.weight_decay * self.leak.steps
        found = [-self.leak.exposed.change[n].to(own[n]) / self.leak.rate for n in self.names]
        if self.stepwise or not decay:
            return found
        return [torch.where(g == 0, g, g - decay * own[n].detach()) for g, n in zip(found, self.names, strict=True)]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the made-up rows: ``[B, T, D]`` or ``[B, C, H, W]``."""
        rows = self.leak.rows
        if self.words is None:
            return (len(rows), *rows[0].values.shape)  # type: ignore[union-attr]
        return (len(rows), max(map(len, rows)), self.words.weight.shape[1])

    @property
    def classes(self) -> int:
        """K."""
        return int(self.model.config.num_labels)

    @cached_property
    def scale(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of what rows are made of: over the table, or 0 and 1 as of normalised pixels."""
        if self.words is None:
            return torch.zeros(()), torch.ones(())
        table = self.words.weight.detach()
        return table.mean(0), table.std(0)

    def made(self, z: torch.Tensor) -> torch.Tensor:
        """Rows from numbers around 0 with variance 1."""
        mean, std = self.scale
        return mean + std * z

    def change(self, inputs: torch.Tensor, classes: torch.Tensor) -> list[torch.Tensor]:
        """What would have been received of these rows, as a gradient.

        Args:
            inputs: embeddings ``[B, T, D]`` or pixels ``[B, C, H, W]``.
            classes: probability of each class, ``[B, K]``.
        """
        if self.stepwise:
            total = sum(work.share for work in self.leak.works)
            each = [[work.share / total * t for t in self._steps(work, inputs, classes)] for work in self.leak.works]
            found = [sum(parts[1:], parts[0]) for parts in zip(*each, strict=True)]
        else:
            own = [self.reader.space.parameters[n] for n in self.names]
            loss = (self._losses(inputs, classes) * self.leak.weights().to(inputs)).sum()
            found = list(torch.autograd.grad(loss, own, create_graph=True, materialize_grads=True))
        if self.sparse:
            found = [g * (s != 0) for g, s in zip(found, self.signal, strict=True)]
        if self.scaled:
            return found
        factor = length(self.signal) / length(found).clamp_min(1e-20)
        return [factor * g for g in found]

    def _steps(self, work: Work, inputs: torch.Tensor, classes: torch.Tensor) -> list[torch.Tensor]:
        """$(\\theta_0 - \\theta_K) / \\eta$ after the steps of SGD of a client."""
        args, rate = self.reader.training, self.leak.rate
        start = {n: self.reader.space.parameters[n] for n in self.names}
        now: dict[str, torch.Tensor] = dict(start)
        for step in work.steps:
            loss = self._losses(inputs, classes, step, now).mean()
            slope = torch.autograd.grad(loss, list(now.values()), create_graph=True, materialize_grads=True)
            if args.max_grad_norm > 0:
                factor = (args.max_grad_norm / (length(slope) + 1e-6)).clamp_max(1.0)
                slope = tuple(factor * g for g in slope)
            decayed = [g + args.weight_decay * p for g, p in zip(slope, now.values(), strict=True)]
            now = {n: p - rate * g for (n, p), g in zip(now.items(), decayed, strict=True)}
        return [(start[n] - p) / rate for n, p in now.items()]

    def _losses(
        self,
        inputs: torch.Tensor,
        classes: torch.Tensor,
        rows: Sequence[int] | None = None,
        now: Tensors | None = None,
    ) -> torch.Tensor:
        """Cross-entropy of each row, ``[B]``."""
        chosen = list(range(len(inputs))) if rows is None else list(rows)
        return -(classes[chosen] * self.scores(inputs, chosen, now).log_softmax(1)).sum(1)

    def scores(
        self, inputs: torch.Tensor, rows: Sequence[int] | None = None, now: Tensors | None = None
    ) -> torch.Tensor:
        """Class scores of each row, ``[B, K]``.

        Args:
            inputs: of all rows.
            rows: which are meant; all unless given.
            now: tensors of the space instead of those that are loaded.
        """
        chosen = list(range(len(inputs))) if rows is None else list(rows)
        batch, seen = self._batch(chosen, inputs), inputs[chosen]
        model = TaskModel(self.model if now is None else _Moved(self.model, self._renamed(now)))  # type: ignore[arg-type]
        hook = self.words.register_forward_hook(lambda *_: seen) if self.words is not None else None
        try:
            return self.reader.task.scores(model, batch)
        finally:
            if hook is not None:
                hook.remove()

    def _batch(self, rows: Sequence[int], inputs: torch.Tensor) -> Batch:
        """The batch that a model is given around made-up rows; ids say where padding is, and nothing else."""
        device, lengths = inputs.device, torch.tensor([len(self.leak.rows[at]) for at in rows])
        target = torch.zeros(len(rows), dtype=torch.long)
        if self.words is None:
            return Batch.of(torch.zeros(len(rows), 0, dtype=torch.long), lengths, target, inputs[list(rows)]).to(device)
        pad = self.reader.pad
        ids = torch.full((len(rows), inputs.shape[1]), pad)
        ids[torch.arange(inputs.shape[1]) < lengths[:, None]] = (pad + 1) % len(self.words.weight)
        return Batch.of(ids, lengths, target).to(device)

    def _renamed(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        """Tensors of the space by the names that the model has for them."""
        own = self.reader.space.parameters
        return {self._places[id(own[name])]: tensor for name, tensor in tensors.items()}

    @cached_property
    def _places(self) -> dict[int, str]:
        return {id(p): name for name, p in self.model.named_parameters()}

    def tokens(self, inputs: torch.Tensor, alike: str = "distance") -> list[torch.Tensor]:
        """The tokens nearest to embeddings ``[B, T, D]``, of each row ``[T]``; padding is none of them.

        Args:
            inputs: the embeddings.
            alike: by ``distance`` or by ``cosine``.
        """
        assert self.words is not None
        table = self.words.weight.detach()
        flat = inputs.detach().flatten(0, 1)
        if alike == "cosine":
            unit = nn.functional.normalize
            apart = -unit(flat, dim=1) @ unit(table, dim=1).T
        else:
            apart = table.square().sum(1) - 2 * flat @ table.T  # up to a constant of each row
        apart[:, self.reader.pad] = torch.inf
        ids = apart.argmin(1).view(inputs.shape[:2]).cpu()
        return [row[: len(one)] for row, one in zip(ids, self.leak.rows, strict=True)]

    def embedded(self, ids: torch.Tensor) -> torch.Tensor:
        """What comes out of the table for tokens ``[B, T]``."""
        assert self.words is not None
        return self.words.weight.detach()[ids]

    def note(self) -> str:
        """What a reader must know of how the change was read."""
        if self.stepwise:
            return f"{self.leak.steps} local steps done over"
        if self.scaled:
            return ""
        several = f" of {self.leak.steps} steps" if self.leak.steps > 1 else ""
        return f"the change{several} gives the direction of a gradient only"


class _Moved:
    """A model with other tensors in place of some of its parameters."""

    def __init__(self, model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        self._model, self._tensors = model, dict(tensors)

    def __call__(self, **inputs: torch.Tensor) -> Any:
        return torch.func.functional_call(self._model, self._tensors, kwargs=inputs)


def length(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The norm of all tensors together, ``[]``."""
    return torch.stack([t.square().sum() for t in tensors]).sum().sqrt()


def distance(found: Sequence[torch.Tensor], signal: Sequence[torch.Tensor]) -> torch.Tensor:
    """$\\lVert g' - g \\rVert^2 / \\lVert g \\rVert^2$ over all tensors; relative, as gradients may be
    so small that their squares are lost."""
    apart = torch.stack([(a - b).square().sum() for a, b in zip(found, signal, strict=True)]).sum()
    return apart / length(signal).square().clamp_min(1e-20)


def apart(found: Sequence[torch.Tensor], signal: Sequence[torch.Tensor]) -> torch.Tensor:
    """$1 - \\cos(g', g)$ of all tensors as one vector, from 0 to 2."""
    inner = torch.stack([(a * b).sum() for a, b in zip(found, signal, strict=True)]).sum()
    return 1 - inner / (length(found) * length(signal)).clamp_min(1e-20)


Objective = Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], torch.Tensor]


@contextmanager
def rehearsal(case: Case, leak: Leak) -> Iterator[Rehearsal]:
    """Within it, the model has the tensors from which the client began, and gradients of gradients."""
    run, reader = case.watched.federation, case.reader
    args, model = reader.training, reader.loaded.model
    reader.space.load({n: t for n, t in leak.exposed.start.items() if n in reader.space.parameters})
    reader.space.train_only(tuple(n for n in leak.exposed.change if n in reader.space.parameters))
    reader.mode(training=False)
    plain = args.optim == "sgd" and run.privacy is None
    norm = float(length([t.double() for t in leak.exposed.change.values()]))
    bounds = [s.max_norm for s in run.stages if isinstance(s, Clip)]
    several = len(leak.works) > 1  # Each of them may have been cut, which their mean does not show.
    cut = any(several or norm > (1 - NEAR) * bound for bound in bounds)
    clipped = args.max_grad_norm > 0 and (several or norm > (1 - NEAR) * args.max_grad_norm * leak.rate)
    within = {id(p) for p in model.parameters()}
    inside = all(id(p) in within for p in reader.space.parameters.values())
    stepwise = plain and inside and 1 < leak.steps <= UNROLLED
    found = Rehearsal(
        reader,
        leak,
        stepwise=stepwise,
        scaled=plain and not cut and (stepwise or (leak.steps == 1 and not clipped)),
        sparse=any(Trait.DENSE in stage.breaks for stage in run.stages),
    )
    # Attention kernels have no second derivative.
    usual = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield found
    finally:
        model.set_attn_implementation(usual)
        reader.space.load({})
