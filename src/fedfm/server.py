"""The server's side of one round: asking, admitting, dropping, noting."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch

from fedfm.core import seeds, trees
from fedfm.core.client import View
from fedfm.core.jobs import Job
from fedfm.core.method import Client, Mean, Rule, State
from fedfm.core.space import Layout
from fedfm.core.traits import Trait
from fedfm.core.update import Member, Tensors, Update
from fedfm.errors import BadUpdate, NoUpdates, TooFewUpdates
from fedfm.links.link import Link, Live, Reply
from fedfm.robust.sight import Sight
from fedfm.train.rows import OnRows
from fedfm.value.exactness import Exactness
from fedfm.wire.admit import BROKEN, admit, at_rank, brief
from fedfm.wire.stage import Stage, received

if TYPE_CHECKING:
    from fedfm.federation import Federation


@dataclass
class RoundServer:
    """What a round sees of the federation, and what it notes of it.

    Args:
        federation: whose round.
        link: how clients are reached.
        round: its number, from 1.
        members: who takes part.
        state: the state at its beginning.
        screens: what screens keep, by their names; replaced when a round's uploads were screened.
        kept: what stages keep, by their positions; replaced when the mean is released.
        summed: what stages sent beside uploads that were summed unseen, in sum.
    """

    federation: Federation
    link: Link
    round: int
    members: tuple[Member, ...]
    state: State
    screens: Mapping[str, Any] = field(default_factory=dict)
    kept: dict[int, Tensors] = field(default_factory=dict)
    dropped: list[dict[str, str]] = field(default_factory=list)
    took_part: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    seen: list[Update] = field(default_factory=list)
    bytes_up: int = 0
    bytes_down: int = 0
    exactness: Exactness | None = None
    summed: Tensors = field(default_factory=dict)
    _beside: dict[str, Tensors] = field(default_factory=dict)
    _expected: Tensors | None = None

    @property
    def space(self) -> Layout:
        return self.federation.layout

    @property
    def rule(self) -> Rule:
        return self.federation.rule

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The stages as they are in this round."""
        return tuple(stage.at(self.kept.get(i, {})) for i, stage in enumerate(self.federation.stages))

    @property
    def told(self) -> Tensors:
        """What clients must know of the stages in this round, beside the method's message."""
        return {f"@{i}:{n}": t for i, stage in enumerate(self.stages) for n, t in stage.told().items()}

    @property
    def private(self) -> bool:
        """Whether a stage releases the mean, also of a round in which nobody's upload arrived."""
        return any(_releases(stage) for stage in self.federation.stages)

    @property
    def ids(self) -> Sequence[str]:
        """All clients, whether or not they take part in this round."""
        return self.federation.ids

    def member(self, id: str) -> Member:
        """The member called ``id``."""
        return self.federation.plan.members.member(id)

    @property
    def mean(self) -> Mean:
        return self._release if self.private else self.federation.mean

    def _release(self, updates: Iterable[Update]) -> Update:
        """The mean as the stages let it out."""
        federation = self.federation
        try:
            mean = federation.mean(updates)
        except TooFewUpdates:
            raise
        except NoUpdates:
            zeros = {name: torch.zeros_like(t) for name, t in (self._expected or self.space.initial).items()}
            mean = Update(zeros, weight=0.0, kind=federation.method.sends, member="mean")
        beside = self.summed or trees.total(of for member, of in self._beside.items() if member in self.took_part)
        setting = replace(
            federation.setting, stages=self.stages, secret=federation.secret, memory=self.kept, beside=beside, kept={}
        )
        for position, stage in enumerate(self.stages):
            if _releases(stage):
                draw = seeds.generator(federation.secret, self.round, "release", position, type(stage).__name__)
                mean = stage.release(mean, setting, draw)
        self.kept = {**self.kept, **setting.kept}
        return mean

    def ask(self, phase: str, messages: Mapping[Member, Tensors], round: int | None = None) -> Iterator[Update]:
        """The admitted updates in the order of client ids; who fails is dropped and named.

        Args:
            phase: a task of the method.
            messages: what each client receives.
            round: the round that the clients believe to be in, when it is another one.
        """
        method, secure = self.federation.method, self.federation.secure
        if phase not in method.phases:
            raise ValueError(f"{type(method).__name__} has no task {phase!r}, only {', '.join(method.phases)}")
        if self.federation.marking:
            messages = self.federation.marking.dispatched(messages, round or self.round)
        self._expected = method.expects(phase, next(iter(messages.values()), {})) if messages else None
        if secure:
            return iter(secure.gathered(self, phase, messages, round or self.round))
        updates = self._admitted(phase, messages, round or self.round)
        if self._aligned(phase) and self._expected is None:
            updates = self._alike(list(updates))
        if self.federation.screens and phase == method.phases[-1]:
            return self._screened(list(updates), messages)
        return updates

    def do(self, job: Job) -> Any:
        """The answer to a job on the server's own rows."""
        return self.federation.trainer.answer(job, View(Member("server", 0), self.round, space=self.space))

    def guided(self, job: Job, client: Client, share: float) -> Any:
        """The answer to a job on a share of a client's training rows, drawn once for the run; in simulation only.

        Args:
            job: the job.
            client: whose rows they are.
            share: of its rows, at least one.
        """
        trainer = self.federation.trainer
        count = len(trainer.encoded(client.member.id, "train"))
        order = seeds.numpy_generator(self.federation.seed, "guide", client.member.id).permutation(count)
        rows = tuple(int(i) for i in sorted(order[: max(1, round(share * count))]))
        return trainer.answer(OnRows({}, job, rows), client)

    def _aligned(self, phase: str) -> bool:
        method = self.federation.method
        return Trait.ALIGNED in method.traits and phase == method.phases[-1]

    @property
    def _shared(self) -> Tensors:
        return trees.select(self.space.initial, self.federation.method.share)

    def _alike(self, updates: list[Update]) -> Iterator[Update]:
        """The uploads with the most frequent names and shapes; of equally frequent ones, those of the first client."""
        shapes = [tuple(sorted((name, tuple(t.shape)) for name, t in u.tensors.items())) for u in updates]
        counts = Counter(shapes)
        usual = max(counts, key=counts.__getitem__, default=())
        for update, shape in zip(updates, shapes, strict=True):
            if shape == usual:
                yield update
            else:
                self.took_part.pop(update.member, None)
                reason = "its upload has other names or shapes than those of most clients"
                self.dropped.append({"client": update.member, "reason": reason})

    def _screened(self, updates: list[Update], messages: Mapping[Member, Tensors]) -> Iterator[Update]:
        """What the screens leave of the uploads; who was left out is noted."""
        before = [update.member for update in updates]
        sent, public = {member.id: message for member, message in messages.items()}, len(self.federation.public)
        for position, screen in enumerate(self.federation.screens):
            name = f"{position}:{screen.id}"
            sight = Sight(self, self.federation.method, self.state, sent, public, name, self.screens.get(name, {}))
            updates = screen.screen(updates, sight)
            if sight.kept is not None:
                self.screens = {**self.screens, name: sight.kept}
            if sight.reasons:
                self.notes["screened_because"] = {**self.notes.get("screened_because", {}), **sight.reasons}
        kept = {update.member for update in updates}
        self.notes["screened_out"] = [member for member in before if member not in kept]
        yield from updates

    def _admitted(self, phase: str, messages: Mapping[Member, Tensors], round: int) -> Iterator[Update]:
        needed = min(self.federation.limits.min_clients, len(messages)) if phase in self.federation.method.phases else 0
        accepts, count = [], 0
        told = self.told
        sent = {member: {**message, **told} for member, message in messages.items()} if told else messages
        for reply in self.link.ask(phase, round, sent):
            update = self._usable(reply, phase, messages[reply.member])
            if update is None:
                continue
            count += 1
            # What a client keeps of a round that may not count must wait for the others.
            accepts.append(reply.accept) if needed > 1 else reply.accept()
            yield update
            # Held no longer than the receiver holds it: the next update may need the memory.
            del reply, update
        if needed > 1 and count < needed:
            raise TooFewUpdates(f"{count} of {len(messages)} updates could be used, but a round needs {needed}")
        for accept in accepts:
            accept()

    def begin(self, phase: str, messages: Mapping[Member, Tensors], round: int) -> None:
        """Give clients a task in their own time. Arguments as of :meth:`ask`; only over a link that is live."""
        cast(Live, self.link).begin(phase, round, messages)

    @property
    def in_flight(self) -> set[str]:
        """Clients that are at work on what was begun."""
        return cast(Live, self.link).in_flight

    def arrived(self, phase: str, message: Callable[[Member], Tensors]) -> tuple[Member, Update | None]:
        """Who was the next to finish what was begun, and its update; none if it cannot be used.

        Args:
            phase: the task.
            message: what the client had received.
        """
        reply = cast(Live, self.link).arrived()
        update = self._usable(reply, phase, message(reply.member))
        if update is not None:
            reply.accept()
        return reply.member, update

    def _usable(self, reply: Reply, phase: str, message: Tensors) -> Update | None:
        """The update in a reply, checked; whose cannot be used is dropped and named."""
        method = self.federation.method
        self.count(reply)
        update, like = reply.update, method.expects(phase, message)
        try:
            if update is None:
                raise BadUpdate(reply.reason)
            update = received(self.stages, update, like)
            update, beside = self._parted(update)
            if Trait.ANY_RANK in method.traits and phase == method.phases[-1]:
                admit(update, method.kind(phase), at_rank(update, like or self._shared), self.federation.limits)
            else:
                admit(update, method.kind(phase), like if self._aligned(phase) else None, self.federation.limits)
            update = method.read(phase, update, message)
        except (BadUpdate, *BROKEN) as error:
            self.drop(reply, error)
            return None
        self.note(reply, {**update.metrics, "weight": update.weight})
        if beside:
            self._beside[update.member] = beside
        if self.federation.audits:
            self.seen.append(update)
        if self.exactness and phase == method.phases[-1]:
            self.exactness.add(update, message)
        return update

    def _parted(self, update: Update) -> tuple[Update, Tensors]:
        """An upload, and what stages sent beside it.

        Raises:
            BadUpdate: a stage's part is missing, or is no finite number.
        """
        names = [name for stage in self.stages for name in stage.beside]
        beside = {name: update.tensors[name] for name in names if name in update.tensors}
        for name in names:
            if name not in beside or beside[name].numel() != 1 or not math.isfinite(float(beside[name])):
                raise BadUpdate(f"the number {name!r} beside its upload is missing or not finite")
        rest = {name: tensor for name, tensor in update.tensors.items() if name not in beside}
        return (replace(update, tensors=rest) if names else update), beside

    def count(self, reply: Reply) -> None:
        """Add up what a reply and its message took."""
        self.bytes_down += reply.bytes_down
        self.bytes_up += reply.bytes_up

    def drop(self, reply: Reply, error: Exception) -> None:
        """Name a client whose reply cannot be used."""
        why = error if isinstance(error, BadUpdate) else f"it cannot be read: {error}"
        self.dropped.append({"client": reply.member.id, "reason": brief(str(why))})

    def note(self, reply: Reply, told: Mapping[str, float]) -> None:
        """Who took part; what a client does in several tasks of a round adds up.

        Args:
            reply: of the client.
            told: its weight and metrics, as far as they are seen.
        """
        before = self.took_part.get(reply.member.id, {"seconds": 0.0, "steps": 0, "bytes_up": 0})
        self.took_part[reply.member.id] = {
            **before,
            **told,
            "seconds": round(before["seconds"] + reply.seconds, 3),
            "steps": before["steps"] + reply.steps,
            "bytes_up": before["bytes_up"] + reply.bytes_up,
            **({"memory": max(reply.memory, before.get("memory", 0))} if reply.memory else {}),
        }

    def record(self) -> dict[str, Any]:
        """The round as a line of ``metrics.jsonl``."""
        losses = [(c["loss"], c["weight"]) for c in self.took_part.values() if "loss" in c]
        weight = sum(w for _, w in losses)
        loss = sum(x * w for x, w in losses) / weight if weight else math.nan
        return {
            "round": self.round,
            "train_loss": loss if math.isfinite(loss) else None,
            "participants": self.took_part,
            "dropped": self.dropped,
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            **self.notes,
        }


def _releases(stage: Stage) -> bool:
    return type(stage).release is not Stage.release
