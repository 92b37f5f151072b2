"""The client half of a task where some clients are hostile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from fedfm.attack.attack import POISONED, PROBED, Attack, Probed
from fedfm.attack.threat import Circle, Sight
from fedfm.core.client import Task
from fedfm.core.update import Member, Tensors, Update
from fedfm.links.worker import Asked, Done, Worker

PROBES = {"probe-validate": ("validate", "validation"), "probe-test": ("test", "test")}
"""Tasks that score a model on triggered rows: the task of the method that does it, and the split it looks at."""
SLOT = "@threat"
"""Under which a hostile client keeps what it remembers."""


class Attacked(Worker):
    """Runs client work; hostile clients do what their threat makes of it.

    Honest clients do what they do in a :class:`Worker`. A forged upload replaces the honest one of a method's last
    task. Who forges by looking at others' uploads is answered when all of them are there, so that memory grows with the
    clients of a round.

    Args:
        attack: the threat and who carries it out.
    """

    def __init__(self, *arguments: Any, attack: Attack, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.attack = attack
        self._probed = Probed(self.trainer.task)
        self._hostile: frozenset[str] = frozenset()
        self._circle = Circle()
        self._probing = False
        self._late: dict[str, tuple[Task, Asked]] = {}
        self._seen: dict[str, Update] = {}

    def tasks(self, phase: str, round: int, messages: Mapping[Member, Tensors]) -> Iterator[Done]:
        works = phase in self.method.phases
        self._hostile = frozenset(self.attack.active(round, [m.id for m in messages]) if works else ())
        self._circle, self._probing = Circle(self.attack.hostile), phase in PROBES
        self._late, self._seen = {}, {}
        forges = self._forges(phase)
        if forges and self.attack.threat.knowledge != "local":
            everyone = list(super().tasks(phase, round, messages))
            # Taken before any of them is forged.
            honest = {done.member.id: done.update for done in everyone if done.update is not None}
            colluders = tuple(update for id, update in honest.items() if id in self._late)
            for done in everyone:
                self._forge(done, len(messages), colluders)
            yield from everyone
            return
        for done in super().tasks(phase, round, messages):
            if forges:
                self._forge(done, len(messages), ())
            yield done

    def _forges(self, phase: str) -> bool:
        return bool(self._hostile) and self.attack.threat.forges and phase == self.method.phases[-1]

    def _group(self, phase: str, round: int, messages: Mapping[Member, Tensors]) -> list[Done]:
        trainer = self.trainer
        own, task = trainer.instead, trainer.task
        if phase in PROBES:
            phase, split = PROBES[phase]
            trainer.task = self._probed
            trainer.instead = {(member.id, split): PROBED[split] for member in messages}
        else:
            trainer.instead = {(id, "train"): POISONED for id in self._hostile}
        try:
            return super()._group(phase, round, messages)
        finally:
            trainer.instead, trainer.task = own, task

    def _start(
        self, running: dict[str, Task], phase: str, round: int, member: Member, own: Tensors, message: Tensors
    ) -> None:
        super()._start(running, phase, round, member, own, message)
        self._turn(running[member.id])

    def _step(self, done: Done, task: Task, *answers: object) -> None:
        super()._step(done, task, *answers)
        self._turn(task)

    def _turn(self, task: Task) -> None:
        """Let a hostile client ask for something else, and have the attack tried out in its own way."""
        client, threat = task.client, self.attack.threat
        if task.job is not None and client.member.id in self._hostile:
            who = self.attack.who(client.member.id, client.round, "job")
            task.job = threat.job(task.job, replace(who, circle=self._circle))
        elif task.job is not None and self._probing:
            task.job = threat.trial(task.job, self._circle)

    def _finish(self, done: Done, task: Task, asked: Asked) -> None:
        if not self._forges(asked.phase):
            super()._finish(done, task, asked)
            return
        update = self._sent(done, task)
        if done.member.id in self._hostile:
            # The stages are passed once it is forged.
            done.update = update
            self._late[done.member.id] = (task, asked)
            return
        numbered = list(enumerate(self.stages))
        packing = next((at for at, stage in numbered if stage.packs), len(numbered))
        update, memories = self._staged(update, numbered[:packing], asked)
        if self.attack.threat.knowledge == "omniscient":
            self._seen[done.member.id] = update
        update, more = self._staged(update, numbered[packing:], asked)
        self._close(done, update, task.client.kept, {**memories, **more}, asked)

    def _forge(self, done: Done, cohort: int, colluders: tuple[Update, ...]) -> None:
        """Put what a hostile client sends in the place of its honest upload."""
        id, threat = done.member.id, self.attack.threat
        if id not in self._late or done.update is None:
            return
        task, asked = self._late[id]
        before = {n.partition(":")[2]: t for n, t in asked.stored.items() if n.startswith(f"{SLOT}:")}
        sight = Sight(
            who=self.attack.who(id, asked.round, "update"),
            round=asked.round,
            own=done.update,
            message=task.message,
            cohort=cohort,
            hostile=len(self._hostile),
            colluders=colluders,
            honest=tuple(self._seen.values()),
            memory=before,
        )
        update = replace(done.update, tensors=dict(threat.update(sight)))
        packing = [(at, stage) for at, stage in enumerate(self.stages) if stage.packs]
        update, memories = self._staged(update, packing, asked)
        if sight.kept is not None:
            memories[SLOT] = sight.kept
        self._try(done, partial(self._close, done, update, task.client.kept, memories, asked))
