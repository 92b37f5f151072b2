"""A watermark in one federation: its key, the server's work on the model, what clients receive, what came of it."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedfm import parts
from fedfm.core import trees
from fedfm.core.client import View
from fedfm.core.jobs import Fit, Job, Loss, Term
from fedfm.core.method import Client, State
from fedfm.core.update import Member, Tensors
from fedfm.errors import RecipeError
from fedfm.ownership.key import FILE, PUBLIC, Key
from fedfm.ownership.marks import examples
from fedfm.ownership.suspect import GIVEN, KEY, Present
from fedfm.ownership.watermark import About, Verdict, Watermark
from fedfm.store.files import safe_name, write_bytes

if TYPE_CHECKING:
    from fedfm.federation import Federation
    from fedfm.tasks.task import Example

LEAST = 16
"""Bytes of a secret."""
TRIED = 16
"""Copies that are traced after a run: each is asked for every client's marks."""


class Marking:
    """The watermark of a federation at work.

    Args:
        watermark: what is done.
        federation: to whose model.
    """

    def __init__(self, watermark: Watermark, federation: Federation) -> None:
        self.watermark = watermark
        self.federation = federation
        self._examples: dict[str, list[Example]] = {}
        self._copies: tuple[State, dict[str, Tensors]] | None = None

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The tensors that are trained, and that the server has."""
        federation = self.federation
        known = federation.layout.initial
        return tuple(n for n in federation.start().weights if n in known and trees.matches(n, federation.method.train))

    @cached_property
    def key(self) -> Key:
        """What the model is to be told by."""
        federation, loaded = self.federation, self.federation.bench.loaded
        about = About(
            federation.task, loaded, federation.classes(), tuple(federation.ids), federation.layout, self.names
        )
        secret = self._secret()

        def random(name: str) -> np.random.Generator:
            digest = hashlib.sha256(b"\0".join([secret, self.watermark.id.encode(), name.encode()])).digest()
            return np.random.default_rng(int.from_bytes(digest, "big"))

        return Key(
            {
                "kind": self.watermark.id,
                "model": loaded.name,
                "head": loaded.head,
                "labels": list((getattr(loaded.model.config, "id2label", None) or {}).values()),
                "task": parts.describe(federation.task),
                "false_positive": self.watermark.false_positive,
                **self.watermark.draw(about, random),
            }
        )

    def _secret(self) -> bytes:
        """From which the key is drawn."""
        if not self.watermark.secret:
            return str(self.federation.secret).encode()
        path = Path(self.watermark.secret).expanduser()
        if not path.exists():
            write_bytes(path, os.urandom(2 * LEAST), private=True)
        found = path.read_bytes()
        if len(found) < LEAST:
            raise RecipeError(
                f"watermark.secret {path} must hold {LEAST} bytes or more that nobody else has, but has {len(found)}. "
                "Name a file that is not there, and it will be made."
            )
        return found

    def begin(self, folder: Path | None, resume: bool) -> None:
        """Commit to the key, before anything is trained.

        Args:
            folder: of the run.
            resume: whether the key of the run is there already.

        Raises:
            RecipeError: the run in the folder has another key, or its key was taken away.
        """
        if folder is None:
            return
        if resume and (folder / PUBLIC).exists() and not (folder / FILE).exists():
            raise RecipeError(
                f"cannot resume: {folder / PUBLIC} commits to a key, but {FILE} is not beside it. Put it back: a new "
                "one would not open what was published."
            )
        if resume and (folder / FILE).exists():
            found = Key.read(folder / FILE)
            if not found.same(self.key):
                raise RecipeError(
                    f"cannot resume: the key in {folder / FILE} is not the one that this recipe and secret give. "
                    "Restore them, or start a new run in another output_dir."
                )
            self.key = found
        self.key.write(folder)

    def to_json(self) -> dict[str, Any]:
        """What may be known of the key from the beginning."""
        return {"kind": self.watermark.id, "commitment": self.key.commitment}

    def marked(self, state: State, round: int, last: bool) -> State:
        """The state with which the server goes on.

        Args:
            state: after the aggregation of a round.
            round: its number; 0 before training.
            last: whether no round comes after it.
        """
        return replace(state, weights=self.watermark.embed(Desk(self, round, last), state.weights))

    def dispatched(self, messages: Mapping[Member, Tensors], round: int) -> dict[Member, Tensors]:
        """What clients receive in a round instead of these messages."""
        own = {member.id: message for member, message in messages.items() if member.id in self.key.content["keys"]}
        copies = self.watermark.dispatch(Desk(self, round, False), own)
        return {member: copies.get(member.id, message) for member, message in messages.items()}

    def job(self, job: Job, client: Client) -> Job:
        """What a client does instead of a job."""
        if isinstance(job, Fit) and job.split == "train":
            return self.watermark.job(job, self.key.content["keys"][client.member.id], client)
        return job

    def verify(self, tensors: Tensors) -> Verdict:
        """What the key says of a model of this federation."""
        federation = self.federation
        return self.watermark.verify(self.key, Present(federation.trainer, tensors, federation.layout))

    def note(self, state: State, began: float) -> dict[str, Any]:
        """What stands in the record of a round.

        Args:
            state: after it.
            began: when the work on the mark began.
        """
        found = None if self.watermark.in_messages else self.verify(state.weights)
        told = {"matches": found.matches, "marks": found.marks, "p_value": found.p_value} if found else {}
        return {**told, "seconds": round(time.monotonic() - began, 3)}

    def copies(self, state: State) -> dict[str, Tensors]:
        """What each client is to have after the run, by its name; nothing where all have the same."""
        if not self.watermark.in_messages:
            return {}
        if self._copies is None or self._copies[0] is not state:
            plan, method = self.federation.plan, self.federation.method
            messages = {m: method.message(state, m) for m in map(plan.members.member, self.federation.ids)}
            copies = {m.id: copy for m, copy in self.dispatched(messages, plan.rounds + 1).items()}
            self._copies = state, copies
        return self._copies[1]

    def save(self, state: State, folder: Path) -> None:
        """Write each client's copy."""
        for client, tensors in self.copies(state).items():
            self.federation.bench.space.save(tensors, folder / "copies" / safe_name(client))

    def results(self, state: State) -> dict[str, Any]:
        """How strongly the model that came out can be told."""
        if not self.watermark.in_messages:
            return {**self.to_json(), **self.verify(state.weights).to_json()}
        copies = self.copies(state)
        some = list(copies)[:: -(-len(copies) // TRIED)]
        found = {client: self.verify(copies[client]) for client in some}
        traced = [client for client, verdict in found.items() if verdict.claims == [client]]
        least = min((verdict.gap for verdict in found.values()), default=0.0)
        says = (
            f"{len(traced)} of {len(found)} clients' copies that were tried are traced to their client, the next one's "
            f"marks at least {100 * least:.0f} points below"
        )
        told = {client: verdict.to_json() for client, verdict in found.items()}
        return {**self.to_json(), "traced": len(traced), "of": len(found), "gap": least, "copies": told, "says": says}


@dataclass(frozen=True)
class Desk:
    """The server at work on its own model; see :class:`fedfm.ownership.watermark.Owner`."""

    marking: Marking
    round: int
    last: bool

    def taught(
        self,
        models: Mapping[str, Tensors],
        rate: float,
        *,
        terms: Sequence[Term] = (),
        public: bool = False,
        purpose: str = "",
    ) -> dict[str, Tensors]:
        """Models after a pass over marks, by whose marks they learn."""
        marking, federation = self.marking, self.marking.federation
        rows = len(federation.public) if public else 0
        args = federation.plan.training
        with self._having(models) as own:
            size = args.per_device_train_batch_size * args.gradient_accumulation_steps
            asked = [
                (
                    Fit(
                        tensors,
                        train=marking.names,
                        terms=tuple(terms),
                        max_steps=-(-(len(own[name]) + rows) // size),
                        purpose=f"watermark {purpose}",
                        split=f"{KEY}+public" if rows else KEY,
                        rate=rate,
                    ),
                    self._view(name),
                )
                for name, tensors in models.items()
            ]
            answers = federation.trainer.answers(asked)
        return {
            name: {**tensors, **{n: answer.tensors[n] for n in marking.names}}
            for (name, tensors), answer in zip(models.items(), answers, strict=True)
        }

    def known(self, models: Mapping[str, Tensors]) -> dict[str, float]:
        """Share of the marks that each model answers as the key says with a probability above one half."""
        with self._having(models):
            asked = [(Loss(tensors, split=KEY), self._view(name)) for name, tensors in models.items()]
            answers = self.marking.federation.trainer.answers(asked)
        return {name: float((a.loss < GIVEN).float().mean()) for name, a in zip(models, answers, strict=True)}

    def _view(self, name: str) -> View:
        return View(Member(name, 0), max(1, self.round), space=self.marking.federation.layout)

    @contextmanager
    def _having(self, names: Mapping[str, Any]) -> Iterator[dict[str, list[Example]]]:
        """Within it, the trainer has marks for whom they are."""
        marking, federation = self.marking, self.marking.federation
        trainer, own = federation.trainer, marking._examples
        for name in names:
            if name not in own:
                own[name] = examples(federation.task, federation.bench.loaded, marking.key.content["keys"][name])
        pulse = trainer.pulse
        trainer.pulse = lambda steps: federation.stepped(0)  # No client's time runs, and no client's steps are counted.
        try:
            with ExitStack() as stack:
                for name in names:
                    stack.enter_context(trainer.given(self._view(name), own[name], KEY))
                yield own
        finally:
            trainer.pulse = pulse
