"""The client's half of a task: the method's work, the stages, the deadline, the private state. Links carry the rest."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from fedfm.core import seeds
from fedfm.core.client import Task, View
from fedfm.core.jobs import Fitted
from fedfm.core.method import Method
from fedfm.core.space import Layout
from fedfm.core.update import Member, Tensors, Update
from fedfm.errors import BadUpdate, ClientError, FedfmError, LateClient, Stopped
from fedfm.secure.letters import MARK
from fedfm.store.clients import ClientStore
from fedfm.train.trainer import Trainer
from fedfm.wire.stage import Sender, Stage

if TYPE_CHECKING:
    from fedfm.ownership.marking import Marking
    from fedfm.secure.secure import Secure, Study

CLIENT_FAULTS = (FedfmError, MemoryError, OSError)
"""Causes for which a client is dropped. Anything else is a defect of the method or of fedfm and ends the run."""


@dataclass
class Done:
    """A finished task.

    Args:
        member: whose task.
        update: what it sends, through all stages; ``None`` when it failed.
        reason: why it failed.
        seconds: how long it took; of tasks that were trained together, an equal share.
        steps: optimizer steps.
        memory: bytes that it needed at least, as far as they are known; see :class:`fedfm.core.jobs.Fitted`.
        kept: its new private state; ``None`` when that stays as it was.
    """

    member: Member
    update: Update | None = None
    reason: str = ""
    seconds: float = 0.0
    steps: int = 0
    memory: int = 0
    kept: Tensors | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Asked:
    """What stands around a client's task.

    Args:
        phase: the task.
        round: number of the round.
        stored: all that the client keeps.
        told: what the server tells stages.
    """

    phase: str
    round: int
    stored: Tensors
    told: Tensors


class Worker:
    """Runs client work with the trainer of this process.

    Args:
        method: the federated method.
        trainer: answers the jobs.
        store: clients' private state.
        stages: done to every upload.
        secure: how uploads are summed: each is masked after its stages, and never leaves as it is.
        seed: the run's seed.
        secret: seed of what those stages draw whose noise must be unknown to others; the run's seed unless given.
        layout: the tuned tensors, as every party knows them.
        hide_metrics: send no metrics, because a stage hides single uploads.
        timeout_s: seconds a client may work on one task; 0 means no limit.
        release: shown each update before it is masked, as nobody can look into it afterwards; may raise.
        on_step: told of every optimizer step; may raise ``Stopped``.
        marking: what clients do for a watermark.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        method: Method,
        trainer: Trainer,
        store: ClientStore,
        *,
        stages: Sequence[Stage] = (),
        secure: Secure | None = None,
        seed: int = 0,
        secret: int | None = None,
        layout: Layout | None = None,
        hide_metrics: bool = False,
        timeout_s: float = 0.0,
        release: Callable[[Update], None] = lambda update: None,
        on_step: Callable[[int], None] = lambda steps: None,
        clock: Callable[[], float] = time.monotonic,
        marking: Marking | None = None,
    ) -> None:
        self.method = method
        self.trainer = trainer
        self.store = store
        self.stages = stages
        self.secure = secure
        self.protocol = secure.phases if secure else ()
        self._parties = secure.parties(stages) if secure else None
        self.seed = seed
        self.secret = seed if secret is None else secret
        self.layout = layout or Layout({}, seed=seed)
        self.hide_metrics = hide_metrics
        self.timeout_s = timeout_s
        self.release = release
        self.on_step = on_step
        self.marking = marking
        self.clock = clock
        self._began = 0.0
        trainer.pulse = self._pulse

    def task(self, phase: str, round: int, member: Member, message: Tensors) -> Done:
        """One client's task."""
        return next(self.tasks(phase, round, {member: message}))

    def tasks(self, phase: str, round: int, messages: Mapping[Member, Tensors]) -> Iterator[Done]:
        """Clients' tasks, in the order of ids; as many go on side by side as the trainer can train together."""
        members = sorted(messages, key=lambda m: m.id)
        if phase in self.protocol:
            yield from (self._protocol(phase, round, member, messages[member]) for member in members)
            return
        # A deadline is a client's own: where there is one, each works alone.
        size = 1 if self.timeout_s else self.trainer.group
        for at in range(0, len(members), size):
            yield from self._group(phase, round, {m: messages[m] for m in members[at : at + size]})

    def accept(self, done: Done, round: int) -> None:
        """The update was admitted: store the client's new private state."""
        if done.kept is not None:
            self.store.put(done.member.id, round, done.kept)

    def met(self, phase: str, round: int, member: Member, message: Tensors) -> Tensors:
        """A message without what it holds for secure aggregation, which the client now has.

        Raises:
            BadUpdate: the client cannot go on in the protocol, and drops out.
        """
        if self._parties and phase in self.method.phases:
            return self._parties.meet(round, member.id, message)
        return message

    def hidden(self, phase: str, round: int, update: Update) -> Update:
        """What leaves a client instead of what its stages let out: masked where it is summed unseen.

        Raises:
            BadUpdate: it cannot be summed; the client drops out.
        """
        if self._parties and phase in self.method.phases:
            self.release(update)
            draw = seeds.numpy_generator(self.secret, round, update.member, "mask")
            return self._parties.mask(round, update, draw)
        return update

    def _protocol(self, phase: str, round: int, member: Member, message: Tensors) -> Done:
        """A client's task of secure aggregation, around the method's own."""
        assert self._parties
        assert self.secure
        began, done = self.clock(), Done(member)
        self._began = began
        try:
            study = self.secure.study(phase, self.method)
            found = self._study(study, round, member, message) if study else None
            done.update = self._parties.answer(phase, round, member.id, message, found)
        except BadUpdate as error:
            done.reason = str(error)
        done.seconds = self.clock() - began
        self.on_step(0)
        return done

    def _study(self, study: Study, round: int, member: Member, message: Tensors) -> Update:
        """What a client finds out of its rows for secure aggregation.

        Raises:
            BadUpdate: it cannot; the client drops out.
        """
        own = {name: tensor for name, tensor in self.store.get(member.id).items() if not name.startswith("@")}
        plain = {name: tensor for name, tensor in message.items() if not name.startswith((MARK, "@"))}
        view = View(member, round, own, self.layout)
        try:
            return self.trainer.answer(study(view, plain), view)
        except Stopped:
            raise
        except (*CLIENT_FAULTS, TimeoutError) as error:
            raise BadUpdate(str(error)) from error

    def _group(self, phase: str, round: int, messages: Mapping[Member, Tensors]) -> list[Done]:
        began = self._began = self.clock()
        done = {member.id: Done(member) for member in messages}
        running: dict[str, Task] = {}
        stored = {member.id: self.store.get(member.id) for member in messages}
        told = {m.id: {n: t for n, t in sent.items() if n.startswith("@")} for m, sent in messages.items()}
        for member, sent in messages.items():
            message = {name: tensor for name, tensor in sent.items() if not name.startswith("@")}
            own = {name: tensor for name, tensor in stored[member.id].items() if not name.startswith("@")}
            self._try(done[member.id], partial(self._start, running, phase, round, member, own, message))
        while waiting := {id: task for id, task in running.items() if task.job is not None}:
            self._advance(waiting, done)
            running = {id: task for id, task in running.items() if done[id].reason == ""}
        for id, task in running.items():
            asked = Asked(phase, round, stored[id], told[id])
            self._try(done[id], partial(self._finish, done[id], task, asked))
        share = (self.clock() - began) / len(messages)
        for one in done.values():
            one.seconds = share
        return list(done.values())

    def _start(
        self, running: dict[str, Task], phase: str, round: int, member: Member, own: Tensors, message: Tensors
    ) -> None:
        message = self.met(phase, round, member, message)
        view = View(member, round, own, self.layout)
        running[member.id] = Task(self.method, phase, view, message)
        self._mark(running[member.id])

    def _advance(self, waiting: Mapping[str, Task], done: Mapping[str, Done]) -> None:
        """Answer the job of each task, together where the trainer can."""
        asked = [(task.job, task.client) for task in waiting.values() if task.job is not None]
        try:
            answers = self.trainer.answers(asked) if len(asked) > 1 else None
        except Stopped:
            raise
        except (*CLIENT_FAULTS, TimeoutError):
            answers = None  # One of them is at fault: alone, each fails or not by itself.
        for position, (id, task) in enumerate(waiting.items()):
            self._try(done[id], partial(self._step, done[id], task, *(answers or ())[position : position + 1]))

    def _step(self, done: Done, task: Task, *answers: object) -> None:
        """Hand over the answer to a client's job; without one, the job is answered now, alone."""
        if answers:
            [answer] = answers
        else:
            assert task.job is not None
            try:
                answer = self.trainer.answer(task.job, task.client)
            except Stopped:
                raise
            except Exception as error:
                raise task.failed(error) from error
        if isinstance(answer, Fitted):
            done.steps += answer.steps
            done.memory = max(done.memory, answer.memory)
        task.send(answer)
        self._mark(task)

    def _mark(self, task: Task) -> None:
        """Let a client press its signature into what it trains, where there is one."""
        if self.marking and task.job is not None:
            task.job = self.marking.job(task.job, task.client)

    def _finish(self, done: Done, task: Task, asked: Asked) -> None:
        update = self._sent(done, task)
        stages = list(enumerate(self.stages if asked.phase in self.method.phases else ()))
        update, memories = self._staged(update, stages, asked)
        self._close(done, update, task.client.kept, memories, asked)

    def _sent(self, done: Done, task: Task) -> Update:
        """What the method's work gave, with the sender's name and the metrics that may be seen."""
        assert task.update is not None
        metrics = {n: v for n, v in task.update.metrics.items() if math.isfinite(v)}
        return replace(task.update, member=done.member.id, metrics={} if self.hide_metrics else metrics)

    def _staged(
        self, update: Update, stages: Iterable[tuple[int, Stage]], asked: Asked
    ) -> tuple[Update, dict[str, Tensors]]:
        """An upload through some of the stages, each with its place among all; and what they remember, by slot."""
        memories: dict[str, Tensors] = {}
        for position, stage in stages:
            slot = f"@{position}"
            seed = self.secret if stage.secret else self.seed
            draw = seeds.generator(seed, asked.round, update.member, "stage", position, type(stage).__name__)
            sender = Sender(draw, _of(slot, asked.stored))
            update = stage.at(_of(slot, asked.told)).send(update, sender)
            if sender.kept is not None:
                memories[slot] = sender.kept
        return update, memories

    def _close(
        self, done: Done, update: Update, kept: Tensors | None, memories: Mapping[str, Tensors], asked: Asked
    ) -> None:
        """Note what a task sends, masked where it is summed unseen, and the client's new private state if there is
        any."""
        update = self.hidden(asked.phase, asked.round, update)
        self._check_deadline()
        stored = asked.stored
        done.update = update
        if kept is not None or memories:
            before = kept if kept is not None else {n: t for n, t in stored.items() if not n.startswith("@")}
            other = {n: t for n, t in stored.items() if n.startswith("@") and n.partition(":")[0] not in memories}
            new = {f"{slot}:{name}": tensor for slot, memory in memories.items() for name, tensor in memory.items()}
            done.kept = {**before, **other, **new}

    def _try(self, done: Done, act: Callable[[], None]) -> None:
        """Do something for one client; what is the client's fault is noted, anything else is raised."""
        try:
            act()
        except (TimeoutError, BadUpdate) as error:
            done.reason = str(error)
        except ClientError as error:
            if not isinstance(error, LateClient) and not isinstance(error.__cause__, CLIENT_FAULTS):
                raise
            done.reason = error.reason

    def _pulse(self, steps: int) -> None:
        self.on_step(steps)
        self._check_deadline()

    def _check_deadline(self) -> None:
        spent = self.clock() - self._began
        if self.timeout_s and spent > self.timeout_s:
            raise TimeoutError(f"late: {spent:.1f} s are more than the {self.timeout_s:g} s allowed")


def _of(slot: str, tensors: Tensors) -> dict[str, torch.Tensor]:
    """What belongs to a stage, by the names that it knows."""
    return {name.partition(":")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{slot}:")}
