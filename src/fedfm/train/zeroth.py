"""Jobs of zeroth-order training: weights moved along random directions that anyone can draw again, and no gradient.

A point is $w = w_0 + \\sum_j c_j z_j$ with K directions $z_j$ that follow from the run's seed, so K numbers $c$ say
where a model of any size is. A direction is never in memory as a whole: its entries are drawn a few at a time where
they are needed, and drawn again when they are needed again. Memory is that of a forward pass and of one tensor.

Letters in shapes: K directions.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from fedfm.core import seeds, trees
from fedfm.core.jobs import Fit, Fitted, Job
from fedfm.core.method import Client
from fedfm.spaces.space import Attached
from fedfm.tasks.task import collate
from fedfm.train.batches import batches

if TYPE_CHECKING:
    from fedfm.train.trainer import Trainer


@dataclass(frozen=True)
class Displaced(Job):
    """A job at $w_0 + \\sum_j c_j z_j$, where $w_0$ is ``tensors``.

    Args:
        coefficients: $c$, ``[K]``.
    """

    coefficients: torch.Tensor

    @torch.no_grad()
    def place(self, trainer: Trainer) -> None:
        """Set the trainer's weights to that point, one tensor at a time."""
        space = trainer.space
        space._patches.set(self.patches)
        snapshot = None if self.tensors else _SNAPSHOTS.get(space)
        if snapshot is not None and snapshot.of(self.coefficients, trainer.seed):
            values, fresh = snapshot.read(), None
        else:
            values, fresh = self._values(trainer), None if self.tensors else Snapshot(self.coefficients, trainer.seed)
        for parameter, value in zip(space.parameters.values(), values, strict=True):
            parameter.requires_grad_(False)
            parameter.grad = None
            if parameter.shape == value.shape:
                parameter.data.copy_(value)
            else:
                parameter.data = value.to(parameter, copy=True)
            if fresh is not None:
                fresh.append(parameter.data)
            trainer.pulse(0)
        if fresh is not None:
            _SNAPSHOTS[space] = fresh

    def _values(self, trainer: Trainer) -> Iterator[torch.Tensor]:
        for name, parameter in trainer.space.parameters.items():
            start = self.tensors[name] if name in self.tensors else trainer.space.initial[name]
            yield moved(name, start.to(parameter.device), self.coefficients, trainer.seed)


@dataclass(frozen=True)
class Descend(Displaced):
    """Steps down the slope along random directions, from a point given by coefficients.

    A step draws a direction $z_j$ of the K with equal probability and a batch, measures the slope
    $g = (L(w + \\epsilon z_j) - L(w - \\epsilon z_j)) / 2 \\epsilon$ and moves the weights in place:
    $w \\leftarrow w - \\eta g z_j$. Answered by :class:`~fedfm.core.jobs.Fitted`, whose ``tensors`` are
    ``coefficients`` ``[K]``: the sum of $-\\eta g$ of each direction, in float32.

    Args:
        epsilon: $\\epsilon$, how far from the weights the loss is measured.
        max_steps: as in :class:`~fedfm.core.jobs.Fit`.
        purpose: names the random draws, so that two jobs in one task differ; batches are those of a ``Fit`` so named.
        split: of which the examples are.
        rate: factor on the run's learning rate.
    """

    epsilon: float
    max_steps: int | None = None
    purpose: str = "fit"
    split: str = "train"
    rate: float = 1.0

    @torch.no_grad()
    def run(self, trainer: Trainer, client: Client) -> Fitted:
        """Do the steps. Dropout is off, as both losses of a step must be those of one function."""
        args = trainer.training
        examples = trainer.examples(client, self.split)
        self.place(trainer)
        trainer.mode(training=False)
        steps = trainer.steps(Fit({}, max_steps=self.max_steps), client, len(examples))
        rate = trainer.learning_rate(client.round) * self.rate
        names = (client.round, client.member.id, self.purpose)
        order = batches(
            list(map(len, examples)),
            args.per_device_train_batch_size,
            seeds.generator(trainer.seed, *names, "batches"),
            args.group_by_length,
        )
        draw = seeds.numpy_generator(trainer.seed, *names, "directions")
        change = torch.zeros(len(self.coefficients), dtype=torch.float64)
        total, seen = 0.0, 0
        for _ in range(steps):
            j = int(draw.integers(len(change)))
            group = [[examples[i] for i in chunk] for chunk in islice(order, args.gradient_accumulation_steps)]
            self._move(trainer, j, self.epsilon)
            above = self._loss(trainer, group)
            self._move(trainer, j, -2 * self.epsilon)
            below = self._loss(trainer, group)
            slope = (above - below) / (2 * self.epsilon)
            # Back to where the step began and down the slope at once, which saves a drawing.
            self._move(trainer, j, self.epsilon - rate * slope)
            change[j] -= rate * slope
            total += (above + below) / 2
            seen += sum(map(len, group))
            trainer.pulse(1)
        return Fitted({"coefficients": change.float()}, steps, seen, total / steps, rate)

    @staticmethod
    def _move(trainer: Trainer, j: int, distance: float) -> None:
        """$w \\leftarrow w + d z_j$ in place."""
        for name, parameter in trainer.space.parameters.items():
            move(parameter.data, [(key(trainer.seed, j, name), distance)])

    @staticmethod
    def _loss(trainer: Trainer, group: Sequence[Sequence[Any]]) -> float:
        """The loss of a batch, given in parts: the mean over its supervised positions, in nats."""
        total, supervised = 0.0, 0
        for chunk in group:
            batch = collate(chunk, trainer.pad)
            total += float(trainer.losses(list(chunk), batch).total.double().sum())
            supervised += trainer._supervised(batch.target)
        return total / supervised


@dataclass(frozen=True)
class At(Displaced):
    """Another job, answered at a point given by coefficients.

    Args:
        job: what is asked there; its own tensors are not looked at.
    """

    job: Job

    def run(self, trainer: Trainer, client: Client) -> Any:
        """The answer to the job."""
        self.place(trainer)
        # The parameters themselves: setting them to what they are takes no memory.
        here = {name: parameter.detach() for name, parameter in trainer.space.parameters.items()}
        return trainer.answer(replace(self.job, tensors=here, patches=self.patches), client)


class Snapshot:
    """Weights on disk, written and read one tensor at a time.

    Clients of a round start at the same point; with it, the second one reads what the first one worked out.

    Args:
        coefficients: that led to them.
        seed: of the directions.
    """

    def __init__(self, coefficients: torch.Tensor, seed: int) -> None:
        self._coefficients = coefficients.clone()
        self._seed = seed
        self._file = tempfile.TemporaryFile(prefix="fedfm-")  # noqa: SIM115 (goes with this object)
        self._kinds: list[tuple[torch.Size, torch.dtype]] = []

    def of(self, coefficients: torch.Tensor, seed: int) -> bool:
        """Whether these are the weights that the coefficients lead to."""
        return seed == self._seed and torch.equal(coefficients, self._coefficients)

    def append(self, tensor: torch.Tensor) -> None:
        """Write one more tensor, bit for bit."""
        self._kinds.append((tensor.shape, tensor.dtype))
        self._file.write(_bytes(tensor.cpu().contiguous()))

    def read(self) -> Iterator[torch.Tensor]:
        """The tensors in the order in which they were written."""
        self._file.seek(0)
        for shape, dtype in self._kinds:
            tensor = torch.empty(shape, dtype=dtype)
            self._file.readinto(_bytes(tensor))  # type: ignore[attr-defined]
            yield tensor


_SNAPSHOTS: WeakKeyDictionary[Attached, Snapshot] = WeakKeyDictionary()
"""The last point of each space that is attached. What is computed does not depend on it, only how fast."""


def moved(name: str, value: torch.Tensor, coefficients: torch.Tensor, seed: int) -> torch.Tensor:
    """The tensor ``name`` moved by all directions, a copy: $w_0 + \\sum_j c_j z_j$, summed in float32 or wider.

    Args:
        name: which part of the directions.
        value: $w_0$.
        coefficients: $c$, ``[K]``.
        seed: the run's seed.
    """
    wide = trees.wide(value).clone(memory_format=torch.contiguous_format)
    used = coefficients.nonzero().flatten().tolist()
    move(wide, [(key(seed, j, name), float(coefficients[j])) for j in used])
    return wide.to(value.dtype)


def key(seed: int, j: int, name: str) -> int:
    """What names the part of direction ``j`` that belongs to the tensor ``name``."""
    return seeds.derive(seed, "direction", j, name)


def move(tensor: torch.Tensor, steps: Sequence[tuple[int, float]]) -> None:
    """``tensor += distance * normals(key)`` in place for each (key, distance), in order."""
    flat = tensor.view(-1)
    size = 1 << 16 if tensor.device.type == "cpu" else 1 << 24  # what fits in a cache; what keeps a GPU busy
    for at in range(0, flat.numel(), size):
        part = flat[at : at + size]
        for which, distance in steps:
            part.add_(normals(which, at, part.numel(), part.device).to(part.dtype), alpha=distance)


def normals(key: int, at: int, count: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Entries ``at`` to ``at + count`` of the random vector ``key``, each standard normal, ``[count]``.

    A function of key and position alone (a counter through the mixer of SplitMix64, four entries from each of its 64
    bits, looked up in a table of 65536 quantiles), so that every processor and any number of threads draw the same
    bits, and a part can be drawn without what comes before it.

    Args:
        key: at least 0, below $2^{63}$.
        at: a multiple of 4.
        count: how many.
        device: where they are drawn.
    """
    mixed = torch.arange(at // 4, (at + count + 3) // 4, device=device)
    mixed.mul_(_WEYL).add_(key)
    for shift, factor in ((30, _MIX_1), (27, _MIX_2), (31, 1)):
        # Shifts of signed numbers copy the sign; the mask takes the copies away.
        mixed.bitwise_xor_((mixed >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(factor)
    places = mixed.view(torch.int16)[:count].int().add_(1 << 15)
    return _quantiles(str(device)).index_select(0, places)


def _bytes(tensor: torch.Tensor) -> Any:
    """A contiguous tensor's own memory, as bytes."""
    return tensor.view(-1).view(torch.uint8).numpy()


@cache
def _quantiles(device: str) -> torch.Tensor:
    """Standard normal quantiles at the middles of 65536 equal steps, scaled to variance 1."""
    middles = (torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16)
    values = math.sqrt(2) * torch.erfinv(2 * middles - 1)
    return (values / values.square().mean().sqrt()).float().to(device)


def _signed(number: int) -> int:
    """The same 64 bits as a signed number."""
    return number - (1 << 64) if number >> 63 else number


# SplitMix64 (Steele, Lea, Flood 2014, Fast Splittable Pseudorandom Number Generators).
_WEYL, _MIX_1, _MIX_2 = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
