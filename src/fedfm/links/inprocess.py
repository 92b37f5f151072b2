"""The embedded link: clients are views made one after another in this process. No daemon, port or account."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar

from fedfm.core import seeds
from fedfm.core.client import View, work
from fedfm.core.method import Method
from fedfm.core.update import Member, Tensors, Update
from fedfm.errors import BadUpdate, ClientError, FedfmError, LateClient
from fedfm.links.link import Reply
from fedfm.store.clients import ClientStore
from fedfm.train.trainer import Trainer
from fedfm.wire import codec
from fedfm.wire.stage import Stage

_CLIENT_FAULTS = (FedfmError, MemoryError, OSError)
"""Causes for which a client is dropped. Anything else is a defect of the method or of fedfm and ends the run."""


class InProcess:
    """Runs client work with the trainer of this process.

    Args:
        method: the federated method.
        trainer: answers the jobs.
        store: clients' private state.
        stages: done to every upload.
        seed: the run's seed.
        hide_metrics: send no metrics, because a stage hides single uploads.
        timeout_s: seconds a client may work on one task; 0 means no limit.
        on_step: told of every optimizer step; may raise ``Stopped``.
        clock: seconds, monotonic.
    """

    simulated: ClassVar[bool] = True

    def __init__(
        self,
        method: Method,
        trainer: Trainer,
        store: ClientStore,
        *,
        stages: Sequence[Stage] = (),
        seed: int = 0,
        hide_metrics: bool = False,
        timeout_s: float = 0.0,
        on_step: Callable[[int], None] = lambda steps: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.method = method
        self.trainer = trainer
        self.store = store
        self.stages = stages
        self.seed = seed
        self.hide_metrics = hide_metrics
        self.timeout_s = timeout_s
        self.on_step = on_step
        self.clock = clock
        self._began, self._steps = 0.0, 0
        trainer.pulse = self._pulse

    def ask(self, phase: str, round: int, messages: Mapping[Member, Tensors]) -> Iterator[Reply]:
        """One client after another, in the order of ids; what one leaves behind is gone before the next begins."""
        for member in sorted(messages, key=lambda m: m.id):
            yield self._task(phase, round, member, messages[member])

    def _task(self, phase: str, round: int, member: Member, message: Tensors) -> Reply:
        client = View(member, round, self.store.get(member.id))
        down = codec.tensors_size(message) if message else 0
        self._began, self._steps = self.clock(), 0
        try:
            update = work(self.method, phase, client, message, self._answer)
            update = self._send(replace(update, member=member.id), round, phase)
            self._check_deadline()
        except (TimeoutError, BadUpdate) as error:
            return Reply(member, None, str(error), down, 0, self.clock() - self._began)
        except ClientError as error:
            if not isinstance(error, LateClient) and not isinstance(error.__cause__, _CLIENT_FAULTS):
                raise
            return Reply(member, None, error.reason, down, 0, self.clock() - self._began)
        up = codec.size(update) if update.tensors or update.metrics else 0
        accept = partial(self.store.put, member.id, round, client.kept) if client.kept is not None else None
        reply = Reply(member, update, "", down, up, self.clock() - self._began, self._steps)
        return replace(reply, accept=accept) if accept else reply

    def _send(self, update: Update, round: int, phase: str) -> Update:
        """The client's half of all stages; metrics that are not finite stay at home, as JSON has no such numbers."""
        metrics = {n: v for n, v in update.metrics.items() if math.isfinite(v)}
        update = replace(update, metrics={} if self.hide_metrics else metrics)
        for position, stage in enumerate(self.stages if phase in self.method.phases else ()):
            draw = seeds.generator(self.seed, round, update.member, "stage", position, type(stage).__name__)
            update = stage.send(update, draw)
        return update

    def _answer(self, job, client):  # type: ignore[no-untyped-def]
        return self.trainer.answer(job, client)

    def _pulse(self, steps: int) -> None:
        self._steps += steps
        self.on_step(steps)
        self._check_deadline()

    def _check_deadline(self) -> None:
        spent = self.clock() - self._began
        if self.timeout_s and spent > self.timeout_s:
            raise TimeoutError(f"late: {spent:.1f} s are more than the {self.timeout_s:g} s allowed")
