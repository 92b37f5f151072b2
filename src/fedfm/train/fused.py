"""The fused trainer: many clients' factors trained in one forward and backward on the one model in memory.

Clients differ in what they tune and share what is frozen, which is nearly all of the work. Their batches are put one
below the other and packed (:mod:`fedfm.train.packing`), the frozen layers see one long batch, and the tuned layers
multiply each client's part of it by its own weights (:mod:`fedfm.train.stacked`). The loss is the sum over the clients
of each client's own loss, so no gradient crosses from one to another; clipping is per client, and AdamW and SGD work
element by element, so a step on the stacks is a step of each client. Every answer equals that of :class:`Trainer` up to
rounding (1e-5 in float32).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import nn

from fedfm.core import seeds, trees
from fedfm.core.jobs import Fit, Fitted, Job, Loss, Scores
from fedfm.core.method import Client
from fedfm.tasks.task import Batch, Example, Losses, Task, TaskModel, collate
from fedfm.train.batches import batches
from fedfm.train.dropout import Draws
from fedfm.train.packing import Packing
from fedfm.train.room import affordable, budget
from fedfm.train.stacked import Stacked, Unstackable, clip, keep, stack
from fedfm.train.taken import Ran, Taken
from fedfm.train.trainer import Trainer

Asked = tuple[Job, Client]

_KNOWN = {Fit: ("tensors", "train", "terms", "max_steps", "purpose", "split", "rate"), Loss: ("tensors", "split")}
"""Fields of jobs that are understood here; a job that uses another one is answered alone."""


@dataclass
class _Lane:
    """One client's place in a stack.

    Args:
        at: place among the jobs that were asked.
        job: what is asked.
        client: of whom.
        examples: of the split in question.
        turns: optimizer steps, or batches to score.
        tokens: of its ordinary batch.
    """

    at: int
    job: Any
    client: Client
    examples: list[Example]
    turns: int
    tokens: int = 0
    loss: float = 0.0
    seen: int = 0
    parts: list[tuple[list[int], Losses]] = field(default_factory=list)


class Fused(Trainer):
    """Answers jobs of several clients together where that changes nothing, and the others one by one.

    Together go jobs ``Fit`` with the same ``train``, learning rate and number of terms, and jobs ``Loss``. Clients of
    different numbers of steps may share a stack; who is done leaves it. So may LoRA factors of different ranks. Alone
    go, as answered by :class:`Trainer`: jobs on a space with tuned tensors outside linear layers and prompts (``full``)
    or with a tuned language-model head, which runs at chosen positions only; ``Fit`` where a model that cannot be
    packed draws dropout; optimizers that mix elements; and jobs with features not known here. Terms of the loss must
    draw nothing at random.

    A stack grows until it holds ``group`` clients, or until one more would make its batch larger than ``tokens``;
    clients with similar numbers of steps and lengths are put together. Activations grow with the tokens of a forward,
    so the bound is one of memory. Beyond activations, a stack takes one copy of the tuned tensors, of their gradients
    and of the optimizer's moments for each client; where these are large, fewer clients go together.

    ``pulse`` is told of the steps of all clients of a stack at once, and what it raises stops them all. When a client
    cannot be answered, as one without examples, the error is raised as by :class:`Trainer`.

    Args:
        group: clients in one stack, at most.
        tokens: tokens of one forward that trains, at most, where a client alone may exceed it; one that scores may have
            four times as many. By default as many as :func:`affordable` says.
    """

    def __init__(self, *args: Any, group: int = 32, tokens: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        room = budget(self.loaded.model) // 2
        self._group = max(1, min(group, room // max(1, 4 * trees.nbytes(self.space.parameters))))
        self.tokens = affordable(self.loaded.model) if tokens is None else tokens
        self._alone: set[type] = set()

    @property
    def group(self) -> int:
        """How many clients' jobs are worth asking together: one where nothing can be stacked."""
        return self._group if self.stacked and not self.privacy else 1

    def answers(self, asked: Sequence[Asked]) -> list[Any]:
        """The answers to jobs of different clients, in the order asked."""
        if self.privacy:
            return super().answers(asked)
        lanes: dict[tuple[Any, ...], list[_Lane]] = defaultdict(list)
        for at, (job, client) in enumerate(asked):
            if found := self._lane(at, job, client):
                key, lane = found
                lanes[key].append(lane)
        results: dict[int, Any] = {}
        if lanes:
            self.space.load({})  # The layers of the space's own rank, beside the base as it was loaded.
        for (kind, *_), alike in lanes.items():
            together: Callable[[list[_Lane]], list[Any]] = self._fit if kind is Fit else self._score
            for few in self._stacks(alike) if kind not in self._alone else ():
                try:
                    results |= zip((lane.at for lane in few), together(few), strict=True)
                except Unstackable:
                    # Noticed in the first forward, before any step was counted.
                    self._alone.add(kind)
                    break
        return [results[at] if at in results else self.answer(*asked[at]) for at in range(len(asked))]

    @cached_property
    def stacked(self) -> Stacked | None:
        """The tuned layers, if they all can hold a weight per client."""
        stacked = Stacked.of(self.space)
        inside = set(self.model.head.modules()) if stacked and self.model.head is not None else set()
        return None if stacked and any(layer in inside for layer, _, _ in stacked.places) else stacked

    def _lane(self, at: int, job: Job, client: Client) -> tuple[tuple[Any, ...], _Lane] | None:
        """What a job may be put together with, and its place there; ``None`` if it must be answered alone."""
        kind, args = type(job), self.training
        if self.stacked is None or kind not in _KNOWN or not _plain(job):
            return None
        firsts = self.space.initial
        if any(n not in firsts or not _stackable(n, t.shape, firsts[n].shape) for n, t in job.tensors.items()):
            return None
        examples = self.encoded(client.member.id, getattr(job, "split", "train"))
        # The layers below tell clients apart by their tokens, and what is read beside text has none.
        if not examples or examples[0].values is not None:
            return None
        mean = sum(map(len, examples)) / len(examples)
        if isinstance(job, Loss):
            if type(self.task).measure is not Task.measure:
                return None  # What is measured beside the loss may run the model more than once.
            chunks = self.chunks(examples)
            return (Loss,), _Lane(at, job, client, examples, len(chunks), round(mean * len(chunks[0])))
        assert isinstance(job, Fit)
        if (self._random and self.packer is None) or args.optim not in ("adamw_torch", "sgd"):
            return None
        if not any(trees.matches(name, job.train) for name in firsts):
            return None
        rows = min(args.per_device_train_batch_size, len(examples))
        steps = self.steps(job, client, len(examples))
        lane = _Lane(at, job, client, examples, steps, round(mean * rows))
        return (Fit, job.train, self.learning_rate(client.round) * job.rate, len(job.terms)), lane

    def _stacks(self, lanes: list[_Lane]) -> list[list[_Lane]]:
        """Lanes in stacks of two or more, those with most turns first."""
        most = self.tokens * (4 if isinstance(lanes[0].job, Loss) else 1)
        lanes = sorted(lanes, key=lambda lane: (-lane.turns, -lane.tokens))
        # As few stacks as there must be, of about the same number of clients.
        group = -(-len(lanes) // len(_filled(lanes, self._group, most)))
        return [few for few in _filled(lanes, group, most) if len(few) > 1]

    def _fit(self, lanes: list[_Lane]) -> list[Fitted]:
        args, first = self.training, lanes[0]
        assert self.stacked is not None
        stacks = self._stack(lanes)
        chosen = {n: p for n, p in stacks.items() if trees.matches(n, first.job.train)}
        for tensor in chosen.values():
            tensor.requires_grad_()
        starts = [
            {n: p.detach()[c].clone() for n, p in chosen.items()} if lane.job.terms else {}
            for c, lane in enumerate(lanes)
        ]
        rate = self.learning_rate(first.client.round) * first.job.rate
        optimizer = self.optimizer(list(chosen.values()), rate)
        orders = [self._order(lane) for lane in lanes]
        draws = self._draws([(lane.client.round, lane.client.member.id, lane.job.purpose) for lane in lanes])
        sums = torch.zeros(len(lanes), dtype=torch.float64, device=self.device)  # read when a client is done
        fitted: list[Fitted] = []
        left = len(lanes)
        self.mode(training=True)
        with self.stacked.holding(stacks):
            for step in range(first.turns):
                live = sum(lane.turns > step for lane in lanes)
                if live < left:
                    fitted[:0] = self._finished(lanes[live:left], stacks, live, rate, sums)
                    keep(stacks, optimizer, live)
                    left = live
                    if draws is not None:
                        del draws.generators[live:]
                sums[:live] += self._gradients(lanes[:live], orders, chosen, starts, draws)
                if args.max_grad_norm > 0:
                    clip([p.grad for p in chosen.values() if p.grad is not None], args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                self.pulse(live)
        return self._finished(lanes[:left], stacks, 0, rate, sums) + fitted

    def _gradients(
        self,
        lanes: list[_Lane],
        orders: list[Iterator[list[int]]],
        chosen: dict[str, nn.Parameter],
        starts: list[dict[str, torch.Tensor]],
        draws: Draws | None,
    ) -> torch.Tensor:
        """Add up the gradients of one step's forwards, for all clients of the stack; their losses, ``[C]``."""
        forwards = self.training.gradient_accumulation_steps
        groups = [
            [[lane.examples[i] for i in chunk] for chunk in islice(order, forwards)]
            for lane, order in zip(lanes, orders, strict=False)
        ]
        supervised = torch.tensor(
            [sum(self._supervised(e.target[None]) for chunk in group for e in chunk) for group in groups]
        ).to(self.device, non_blocking=True)
        sums = torch.zeros(len(lanes), dtype=torch.float64, device=self.device)
        for k in range(forwards):
            chunks = [group[k] for group in groups]
            total = self._tall_losses(chunks, draws).total
            owner = torch.arange(len(chunks)).repeat_interleave(torch.tensor(list(map(len, chunks))))
            losses = total.new_zeros(len(lanes)).index_add(0, owner.to(self.device), total) / supervised  # [C]
            sums += losses.detach().double()
            for lane, chunk in zip(lanes, chunks, strict=True):
                lane.seen += len(chunk)
            loss = losses.sum()
            if k == 0 and lanes[0].job.terms:
                slices = {n: p.unbind(0) for n, p in chosen.items()}
                for c, lane in enumerate(lanes):
                    own = {n: parts[c] for n, parts in slices.items()}
                    for term in lane.job.terms:
                        loss = loss + term(own, starts[c])
            loss.backward()
        return sums

    def _score(self, lanes: list[_Lane]) -> list[Scores]:
        assert self.stacked is not None
        stacks = self._stack(lanes)
        chunks = [self.chunks(lane.examples) for lane in lanes]
        left = len(lanes)
        self.mode(training=False)
        with self.stacked.holding(stacks), torch.no_grad():
            for turn in range(lanes[0].turns):
                live = sum(lane.turns > turn for lane in lanes)
                if live < left:
                    keep(stacks, None, live)
                    left = live
                now = [[lane.examples[i] for i in own[turn]] for lane, own in zip(lanes[:live], chunks, strict=False)]
                for c, losses in enumerate(self._separate(now)):
                    lanes[c].parts.append((chunks[c][turn], losses))
                self.pulse(0)
        return [_scores(lane) for lane in lanes]

    def _separate(self, chunks: list[list[Example]]) -> Iterator[Losses]:
        """Each client's losses with its own tally: the model runs once, the task once for each client.

        The task is given the model's output for the client's rows alone, as tallies cannot be told apart afterwards.
        """
        examples = [e for chunk in chunks for e in chunk]
        batch = collate(examples, self.pad)
        whole, shown = self.model, batch.to(self.device)
        model = Taken(whole.model, shown)
        body = Taken(whole.body, shown) if whole.body is not None else None
        self.model = TaskModel(model, body, whole.head)
        assert self.stacked is not None
        try:
            with self._cheaply(examples, batch, list(map(len, chunks))):
                self.task.losses(self.model, shown)
        except Ran:
            pass
        finally:
            given, self.model = self.model, whole
        at = 0
        for chunk in chunks:
            part, at = slice(at, at + len(chunk)), at + len(chunk)
            own = batch.part(part).to(self.device)
            for taken in filter(None, (model, body)):
                taken.show(own, part)
            with self.autocast():
                yield self.task.losses(given, own)

    def _tall_losses(self, chunks: list[list[Example]], draws: Draws | None = None) -> Losses:
        """Losses of all clients' rows, one below the other."""
        examples = [e for chunk in chunks for e in chunk]
        return self.losses(examples, collate(examples, self.pad), list(map(len, chunks)), draws)

    def _packing(self, batch: Batch, rows: Sequence[int] | None, draws: Draws | None) -> Packing | None:
        packing = super()._packing(batch, rows, draws)
        if self.stacked is not None and rows is not None:
            # The tuned layers find their clients' rows by it, packed or not.
            self.stacked.packing = packing or Packing.unpacked(batch, rows)
        return packing

    def _stack(self, lanes: list[_Lane]) -> dict[str, nn.Parameter]:
        """All clients' tensors, ``[C, ...]`` by name, in the order of the space."""
        return {
            name: nn.Parameter(
                stack([lane.job.tensors.get(name, first).to(p.device, p.dtype) for lane in lanes]), requires_grad=False
            )
            for (name, first), p in zip(self.space.initial.items(), self.space.parameters.values(), strict=True)
        }

    def _order(self, lane: _Lane) -> Iterator[list[int]]:
        """Its batches, drawn as when it is alone."""
        draw = seeds.generator(self.seed, lane.client.round, lane.client.member.id, lane.job.purpose, "batches")
        size = self.training.per_device_train_batch_size
        return batches(list(map(len, lane.examples)), size, draw, self.training.group_by_length)

    def _finished(
        self, lanes: list[_Lane], stacks: dict[str, nn.Parameter], at: int, rate: float, sums: torch.Tensor
    ) -> list[Fitted]:
        """Answers of the lanes whose place in the stacks begins at ``at``."""
        losses = sums[at : at + len(lanes)].tolist()
        fitted = []
        for c, (lane, loss) in enumerate(zip(lanes, losses, strict=True), start=at):
            shapes = {n: lane.job.tensors.get(n, first).shape for n, first in self.space.initial.items()}
            tensors = {n: p.detach()[c][tuple(map(slice, shapes[n]))].clone() for n, p in stacks.items()}
            memory = self.footprint(tensors, lane.job.train)
            fitted.append(Fitted(tensors, lane.turns, lane.seen, loss / lane.turns, rate, memory))
        return fitted


def _plain(job: Job) -> bool:
    """Whether a job uses only what is understood here."""
    for one in fields(job):
        if one.name not in _KNOWN[type(job)]:
            usual = one.default if one.default_factory is MISSING else one.default_factory()
            if getattr(job, one.name) != usual:
                return False
    return True


def _filled(lanes: list[_Lane], group: int, most: int) -> list[list[_Lane]]:
    """Lanes in their order, put together until there are ``group`` or one more would make more than ``most`` tokens."""
    stacks: list[list[_Lane]] = []
    for lane in lanes:
        if not stacks or len(stacks[-1]) == group or sum(other.tokens for other in (*stacks[-1], lane)) > most:
            stacks.append([])
        stacks[-1].append(lane)
    return stacks


def _stackable(name: str, shape: torch.Size, usual: torch.Size) -> bool:
    """Whether tensors of both shapes fit into one stack: they are equal, but for the rank of a LoRA factor."""
    rank = 0 if ".lora_A." in name else 1 if ".lora_B." in name else None
    return len(shape) == len(usual) and all(
        a == b for i, (a, b) in enumerate(zip(shape, usual, strict=True)) if i != rank
    )


def _scores(lane: _Lane) -> Scores:
    """The batches' losses, in the order of the split."""
    total, count = torch.zeros(len(lane.examples)), torch.zeros(len(lane.examples), dtype=torch.long)
    for chunk, losses in lane.parts:
        total[chunk] = losses.total.float().cpu()
        count[chunk] = losses.count.cpu()
    return Scores(total, count, trees.total({n: t.cpu() for n, t in losses.tally.items()} for _, losses in lane.parts))
