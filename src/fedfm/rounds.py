"""The rounds of a run, one after another: asked, recorded, checkpointed; and gone on with after a crash."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fedfm.core import seeds, trees
from fedfm.core.method import State
from fedfm.core.update import Tensors
from fedfm.errors import FedfmError, NoUpdates, RecipeError, Stopped, TooFewUpdates
from fedfm.links.link import Link
from fedfm.links.transcript import Alter, Listen, Transcript, honest, nobody
from fedfm.observe.observer import Observer
from fedfm.server import RoundServer
from fedfm.store.clients import ClientStore
from fedfm.store.folder import RunFolder
from fedfm.value.exactness import Exactness

if TYPE_CHECKING:
    from fedfm.federation import Federation

PATIENCE = 3
"""Rounds in a row in which every participant was dropped before the run fails."""


@dataclass
class Outcome:
    """What a run leaves.

    Args:
        status: ``completed`` or ``stopped``.
        state: the server's state after the last round.
        records: one per round, as in ``metrics.jsonl``; round 0 is the model before training.
        folder: the run folder, if there is one.
    """

    status: str
    state: State
    records: list[dict[str, Any]]
    folder: Path | None = None

    @property
    def adapter(self) -> Path | None:
        """Folder of the trained adapter or model."""
        return self.folder / "final" if self.folder else None


@dataclass
class Rounds:
    """A run under way.

    Args:
        federation: whose.
        folder: the run folder; ``None`` keeps everything in memory.
        observers: told what happens.
        listen: shown each reply of a client, as the server gets it.
        alter: changes what clients receive; only an audit does that.
    """

    federation: Federation
    folder: RunFolder | None
    observers: Sequence[Observer]
    listen: Listen = nobody
    alter: Alter = honest
    records: list[dict[str, Any]] = field(default_factory=list)
    memory: Mapping[str, Any] = field(default_factory=dict)
    screens: Mapping[str, Any] = field(default_factory=dict)
    stages: dict[int, Tensors] = field(default_factory=dict)
    idle: int = 0
    transcript: Transcript = field(init=False)

    def run(self, resume: bool) -> Outcome:
        """Do all rounds that are still to do, after those in the folder if ``resume``."""
        federation, folder = self.federation, self.folder
        reached = federation.connect(folder.clients if folder else ClientStore(), self.observers)
        self.transcript = Transcript(reached, federation.method.phases[-1], self.listen, self.alter)
        link = cast(Link, self.transcript)
        state, identity, done = federation.start(), self.identity(), 0
        if folder and resume:
            if found := folder.checkpoints.read(type(state)):
                done, state, extra = found
                self.idle, self.memory, self.screens = extra["idle"], extra["schedule"], extra.get("screens", {})
                self.stages = {int(position): tensors for position, tensors in extra.get("stages", {}).items()}
                _same(extra["identity"], identity)
            folder.rewind(done if done else -1)
            self.records = folder.records()
        if federation.marking:
            federation.marking.begin(folder.path if folder else None, resume)
            state = federation.marking.marked(state, 0, False) if not done else state
        last = federation.plan.rounds
        for observer in self.observers:
            observer.started(federation.method.id, last, done, (last - done) * federation.expected_steps())
        status = "stopped"
        try:
            if not self.records:
                self._note(self._before(state, link))
            for number in range(done + 1, last + 1):
                if self._spent(number):
                    break
                state, record = self._round(state, number, link)
                self._note(record)
                if folder:
                    extra = {
                        "identity": identity,
                        "idle": self.idle,
                        "schedule": self.memory,
                        "screens": self.screens,
                        "stages": {str(position): tensors for position, tensors in self.stages.items()},
                    }
                    folder.checkpoints.write(number, state, extra)
                    folder.clients.commit(number)
            link.close()
            status = "completed"
        except Stopped:
            pass
        except BaseException:
            status = "failed"
            raise
        finally:
            for observer in self.observers:
                observer.finished(status)
        if folder and status == "completed":
            federation.save(state, folder.final)
            if federation.marking:
                federation.marking.save(state, folder.path)
        return Outcome(status, state, self.records, folder.path if folder else None)

    def _before(self, state: State, link: Link) -> dict[str, Any]:
        """Round 0: the model as it is before training."""
        federation, began = self.federation, time.monotonic()
        scores = federation.validate(link, state) if federation.evaluation.every else None
        initial = federation.layout.initial
        return {
            "round": 0,
            "seconds": round(time.monotonic() - began, 3),
            "validation": scores.to_json() if scores else None,
            **self._success(state, link, bool(federation.evaluation.every)),
            **({"threat": federation.attack.to_json()} if federation.attack else {}),
            **({"watermark": federation.marking.to_json()} if federation.marking else {}),
            "trainable_parameters": trees.count(trees.select(initial, federation.method.train)),
            "shared_parameters": trees.count(trees.select(initial, federation.method.share)),
            "seen": self.transcript.seen(),
            "simulated": self.transcript.simulated,
            "protecting": federation.protecting,
        }

    def _success(self, state: State, link: Link, due: bool) -> dict[str, float | None]:
        """How often the attack succeeds now, where there is one with an aim."""
        threat = self.federation.threat
        if not (due and threat and threat.targeted):
            return {}
        return {"attack_success": self.federation.probe(state, "validate", link=link)}

    def _spent(self, number: int) -> bool:
        """Whether a round would spend more privacy than there is."""
        budgets = self.federation.budgets
        spent = self.federation.spent(number) if budgets else {}
        return any(spent[who]["epsilon"] > most for who, most in budgets.items())

    def _round(self, state: State, number: int, link: Link) -> tuple[State, dict[str, Any]]:
        """The state after a round, and its record."""
        federation, before, began = self.federation, state, time.monotonic()
        chosen = federation.drawn(number)
        members = tuple(federation.plan.members.member(i) for i in chosen)
        server = RoundServer(federation, link, number, members, state, self.screens, self.stages)
        if federation.attack:
            server.notes["hostile"] = federation.attack.active(number, chosen)
        if not server.private and federation.plainly_averaged:
            server.exactness = Exactness.of(federation.method, federation.layout, number)
        try:
            if chosen or server.private:
                state, self.memory = federation.schedule.advance(federation.method, server, state, self.memory)
                self.screens, self.stages = server.screens, server.kept
            self.idle = 0
        except NoUpdates as error:
            self.idle += 1
            if self.idle >= PATIENCE:
                first = server.dropped[0] if server.dropped else {"client": "nobody", "reason": str(error)}
                raise FedfmError(
                    f"{_why(error)} in {self.idle} rounds in a row; in round {number}, "
                    f"{first['client']!r}: {first['reason']}"
                ) from error
        if server.exactness and (lost := server.exactness.found(state)) is not None:
            server.notes["aggregation_error"] = lost
        for audit in federation.audits:
            server.notes[audit.id] = audit.look(server, federation.method, before, server.seen)
        if federation.marking:
            started, ends = time.monotonic(), number == federation.plan.rounds or self._spent(number + 1)
            state = federation.marking.marked(state, number, ends)
            server.notes["watermark"] = federation.marking.note(state, started)
        trained, every = time.monotonic(), federation.evaluation.every
        due = every and (number % every == 0 or number == federation.plan.rounds)
        scores = federation.validate(link, state) if due else None
        return state, {
            **server.record(),
            "validation": scores.to_json() if scores else None,
            **self._success(state, link, bool(due)),
            "learning_rate": federation.trainer.learning_rate(number),
            "seconds": round(trained - began, 3),
            "evaluation_seconds": round(time.monotonic() - trained, 3),
            "peak_memory_mb": peak_memory_mb(),
            "privacy": federation.spent(number) or None,
            "seen": self.transcript.seen(),
        }

    def _note(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        if self.folder:
            self.folder.append(record)
        for observer in self.observers:
            observer.round_finished(record)

    def identity(self) -> dict[str, str]:
        """What must be the same for a run to go on."""
        federation = self.federation
        parts = (
            "method",
            "space",
            "task",
            "stages",
            "secure",
            "privacy",
            "rule",
            "mean",
            "screens",
            "schedule",
            "profiles",
            "threat",
            "watermark",
            "seed",
        )
        return {
            **{name: repr(getattr(federation, name)) for name in parts},
            "training": repr(replace(federation.plan.training, per_device_eval_batch_size=1)),
            "sampler": repr(federation.plan.sampler),
            "model": federation.bench.loaded.name,
            "members": f"{len(federation.ids)} clients, {seeds.derive(0, *federation.ids[:1000]):x}",
        }


def peak_memory_mb() -> int:
    """Largest resident memory of this process so far, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6)


def _why(error: NoUpdates) -> str:
    return "too few updates could be used" if isinstance(error, TooFewUpdates) else "every client was dropped"


def _same(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    for name, value in now.items():
        if before.get(name) != value:
            raise RecipeError(
                f"cannot resume: {name} was {before.get(name)} and is now {value}. Restore it, or start a new run in "
                "another output_dir."
            )
