"""The site process: the only place where an organisation's rows and private state are.

It listens on a Unix socket, holds model and rows in memory from task to task, and does a task only when it is signed by
the coordinator, newer than all before it, and within the site's policy. What it sends back is signed by the site.
"""

from __future__ import annotations

import fcntl
import json
import re
import time
from collections.abc import Callable, Mapping
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from datasets import ClassLabel, Dataset
from safetensors.torch import load, load_file

from fedfm.core import seeds
from fedfm.core.plan import Members
from fedfm.core.update import Member, Update
from fedfm.data.gather import from_datasets
from fedfm.data.population import Population
from fedfm.data.splits import Splits
from fedfm.dedup.party import KEYS, LEAVE, PHASES, TAGS, Party
from fedfm.deploy import channel, keys, policy
from fedfm.deploy.cipher import Cipher
from fedfm.deploy.kept import Kept
from fedfm.deploy.logs import log
from fedfm.deploy.parcels import Parcels
from fedfm.deploy.seal import COORDINATOR, Seal
from fedfm.errors import BadUpdate, DataError, FedfmError, RecipeError, StoreError
from fedfm.experiment import loading
from fedfm.federation import Federation
from fedfm.links.node import Node, refusal
from fedfm.links.tickets import INLINE, digest, in_order, order, ticket
from fedfm.links.worker import Worker
from fedfm.recipe import Recipe
from fedfm.secure.letters import numbers_in, of_numbers
from fedfm.secure.parties import letter
from fedfm.store.clients import ClientStore
from fedfm.store.files import write_bytes, write_json, writing
from fedfm.store.plain_yaml import loads
from fedfm.wire import codec

_RUN = re.compile(r"[0-9a-f]{32}")
MOST_MEMBERS = 100_000
"""Sites of one federation."""
TRANSPORT = ("put", "part")
"""Kinds of messages that only carry bytes."""
Given = tuple[dict[str, Any], bytes | None, Path | None]
"""How it went, the bytes of the update, and a file with those that belong behind them."""


@dataclass(frozen=True)
class Alone:
    """The site's own client among others of whom it knows nothing but their number.

    Args:
        own: its rows.
        count: clients in all.
    """

    own: Population
    count: int

    @property
    def ids(self) -> list[str]:
        return [*self.own.ids, *(f"other {n}" for n in range(1, self.count))]

    def member(self, id: str) -> Member:
        return self.own.member(id) if id in self.own.ids else Member(id, 1)

    def rows(self, id: str, split: str) -> Any:
        return self.own.rows(id, split)

    def pooled(self) -> Members:
        raise DataError("other clients' rows are on their own machines; nobody can pool them")


@dataclass
class _Signs:
    """Signs of work, for whoever asked last."""

    tell: Callable[[], None] = lambda: None

    def step(self, steps: int) -> None:
        """Work goes on."""
        self.tell()


class Site:
    """One organisation.

    Args:
        folder: with ``policy.yaml``, keys, and ``state``, which the site writes.

    Raises:
        FedfmError: policy, keys or rows cannot be used, or another process serves this site.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.policy = policy.read(folder / "policy.yaml")
        others = {COORDINATOR: keys.public(folder / "coordinator.pub")}
        self.seal = Seal(keys.private(folder / "signing.key"), others)
        # Read once: where the system hands the key over at the start, it may be gone later.
        self._cipher = Cipher(keys.symmetric(self.folder / self.policy.state_key)) if self.policy.state_key else None
        if len(bytes(self.socket)) > channel.MOST_PATH:
            raise StoreError(
                f"{self.socket} is too long for a socket, whose path has at most {channel.MOST_PATH} bytes. Move the "
                "site's folder."
            )
        self.state = self.folder / "state"
        with writing(self.state):
            self.state.mkdir(mode=0o700, exist_ok=True)
        self._lock = self._acquire()
        self._last = self._read_last()
        self._rounds = 0
        self._node: tuple[tuple[Any, ...], Node] | None = None
        self._answered: tuple[Any, Given] | None = None
        self._signs = _Signs()
        self._kept: Kept | None = None
        self._party: Party | None = None
        self.parcels = Parcels(self.state / "parcels")

    @property
    def socket(self) -> Path:
        """Where it listens."""
        return self.folder / "site.sock"

    def answer(
        self, header: dict[str, Any], body: bytes, tell: Callable[[], None] = lambda: None
    ) -> tuple[dict[str, Any], bytes]:
        """What to send back to a question; what cannot be done is said, and signed, too.

        Args:
            header: ``kind`` (``hello``, ``task``, ``settle``, ``put`` or ``part``), ``settings`` and ``signature`` in
                hexadecimal.
            body: the message as safetensors, or a part of it.
            tell: called while work goes on.

        Returns:
            ``settings`` and ``signature``, and the update's bytes, if there are any.
        """
        try:
            kind, settings = str(header["kind"]), dict(header["settings"])
            signature = bytes.fromhex(header["signature"])
        except (KeyError, TypeError, ValueError) as error:
            return {"settings": refusal(f"the message is not one of fedfm: {error!r}"), "signature": ""}, b""
        about = {name: settings.get(name) for name in ("run", "round", "phase")} | {
            "site": self.policy.name,
            "kind": kind,
        }
        self._signs.tell = tell
        rest: Path | None = None
        try:
            apart = kind == "task" and bool(settings.get("size"))
            content = bytes.fromhex(str(settings["content"])) if apart else digest(body)
            self.seal.verify(COORDINATOR, signature, kind, settings, content)
            if kind in TRANSPORT:
                given, up = self._carry(kind, settings, body)
            else:
                self._see_newer(settings)
                given, up, rest = self._do(kind, settings, body)
        except Exception as error:
            # The site goes on. Its log has all; abroad goes no word that could come from a row.
            log.exception("not answered", extra={"about": about})
            told = isinstance(error, FedfmError) and not isinstance(error, DataError)
            why = str(error) if told else f"{type(error).__name__} at the site, whose log says more"
            given, up = refusal(why), None
        log.info("answered", extra={"about": about | {"bytes": len(up or b""), "reason": given.get("reason", "")}})
        sealed = self.seal.sign("reply", given, digest(up, rest), signature)
        return {"settings": given, "signature": sealed.hex(), "up": up is not None}, up or b""

    def _carry(self, kind: str, settings: Mapping[str, Any], body: bytes) -> tuple[dict[str, Any], bytes | None]:
        """Store or read a part of a large payload: bytes alone, which once more do no more than once."""
        if kind == "put":
            self.parcels.put(settings, body)
            return {"reason": ""}, None
        part = self.parcels.part((settings["run"], ticket(settings["ticket"])), settings["at"])
        return (refusal("there is no such update any more", "missing"), None) if part is None else ({}, part)

    def _do(self, kind: str, settings: Mapping[str, Any], body: bytes) -> Given:
        node = self._ready(settings)
        if kind == "hello":
            return {"client": node.member.id, "examples": node.member.examples, **node.member.profile}, None, None
        if kind == "settle":
            node.settle(ticket(settings["accepted"]))
            return {}, None, None
        if kind != "task":
            raise BadUpdate(f"there is no message of the kind {kind!r}")
        if type(settings["round"]) is not int or not 0 <= settings["round"] <= self._rounds:
            raise BadUpdate(f"round {settings['round']} is beyond the {self._rounds} of the recipe")
        down: bytes | Path = body
        if settings.get("size"):
            if (found := self.parcels.find(str(settings["content"]))) is None:
                return refusal("its message is not here", "missing"), None, None
            down = found
        # A task that comes once more, as its answer may have been lost, is answered as it was.
        key = settings["run"], ticket(settings["ticket"])
        asked = key, settings["phase"], settings.get("content") or digest(body)
        if self._answered is None or self._answered[0] != asked:
            self._answered = None
            if settings["phase"] in PHASES:
                given = self._compared(settings, down, key)
            else:
                if self._kept and not self._kept.known:
                    raise BadUpdate("its rows were not compared with those of the other sites, as the recipe asks")
                self._see_once(node, settings, asked[2])
                given = self._worked(node, settings, down, key)
            if given[0]["status"] != "done":
                return given
            self._answered = asked, given
        return self._answered[1]

    def _see_once(self, node: Node, settings: Mapping[str, Any], content: str | bytes) -> None:
        """See that nothing else was answered in this task of this round, where noise is added here.

        The budget counts one answer to each task of a round. The same question gets the same answer, with the same
        noise, also after a loss; another one would get a second draw. Where the noise is in a sum there is no second
        answer: a sum over other clients would have the same noise of this one, and the difference of both would have
        less.

        Raises:
            BadUpdate: another message was answered, or any where uploads are summed.
        """
        stages = node.worker.stages
        noisy = node.worker.trainer.privacy or any(stage.secret for stage in stages)
        if not noisy or settings["phase"] not in node.worker.method.phases:
            return
        place = self.state / str(settings["run"]) / "answered.json"
        known = json.loads(place.read_text()) if place.exists() else {}
        task, said = f"{settings['round']} {settings['phase']}", content if isinstance(content, str) else content.hex()
        came = f"{self._node[0] if self._node else ''} {said}"  # The same message under another recipe is another one.
        if task in known and any(stage.summed for stage in stages):
            raise BadUpdate(
                f"its vector of round {settings['round']} may be in a sum: a second one would be beyond the privacy "
                "budget"
            )
        if known.setdefault(task, came) != came:
            raise BadUpdate(
                f"another message was answered in round {settings['round']}: a second answer would be beyond the "
                "privacy budget"
            )
        write_json(place, known)

    def _worked(self, node: Node, settings: Mapping[str, Any], down: bytes | Path, key: Any) -> Given:
        given, update = node.work(settings, down)
        if update is None:
            return given, None, None
        if node.worker.secure and settings["phase"] not in node.worker.method.scoring:
            # The worker has shown the policy what is masked; the rest of the protocol is keys and shares.
            self.policy.see_size(update)
        else:
            self.policy.release(update)
        return self._packed(given, update, key)

    def _packed(self, given: dict[str, Any], update: Update, key: Any) -> Given:
        """An update on its way: in the reply, or the first of it, where it is fetched in parts."""
        if codec.size(update) <= INLINE:
            return given, codec.encode(update), None
        head, rest = self.parcels.pack(key, update)
        return {**given, "size": rest.stat().st_size}, head, rest

    def _compared(self, settings: Mapping[str, Any], down: bytes | Path, key: Any) -> Given:
        """A step of the comparison of rows before the first round.

        Raises:
            FedfmError: it cannot be done; the site drops out.
        """
        began, run, phase = time.monotonic(), str(settings["run"]), settings["phase"]
        if self._kept is None:
            raise BadUpdate("the recipe does not compare rows")
        message = in_order(load_file(down) if isinstance(down, Path) else load(down), settings["order"])
        if phase == KEYS:
            self._party = Party(self.policy.name, run, Seal(self.seal.own, self._peers()))
        if phase == LEAVE:
            rows = self._rows(list(settings["labels"]))
            self._kept.leave(rows, numbers_in(message, "left-out"), self.policy)
            self._node = self._party = None  # From now on it has fewer rows.
            tensors = of_numbers("examples", [self._ready(settings).member.examples])
        elif self._party is None or self._party.run != run:
            raise BadUpdate("it has no keys for the comparison of rows: it was not asked for any, or was restarted")
        elif phase == TAGS:
            rows = self._rows(list(settings["labels"]))
            tensors = self._party.tags(message, self._kept.fingerprints(rows, self._signs.tell))
        else:
            tensors = self._party.keys() if phase == KEYS else self._party.deal(message)
        update = letter(tensors, self.policy.name)
        self.policy.see_size(update)
        seconds, ways = time.monotonic() - began, order(update.tensors)
        return self._packed({**refusal("", "done"), "seconds": seconds, "order": ways}, update, key)

    def _peers(self) -> dict[str, Ed25519PublicKey]:
        """The sites that this one knows."""
        return {path.stem: keys.public(path) for path in sorted((self.folder / "peers").glob("*.pub"))}

    def _ready(self, settings: Mapping[str, Any]) -> Node:
        """The node of a run, made when the run or its recipe is new."""
        run, text, count = str(settings["run"]), str(settings["recipe"]), int(settings["members"])
        if not _RUN.fullmatch(run):
            raise BadUpdate(f"a run is named by 32 hexadecimal digits, not {run!r}")
        if not 0 < count <= MOST_MEMBERS:
            raise BadUpdate(f"members must be from 1 to {MOST_MEMBERS}, but {count} were named")
        key = run, digest(text.encode()), count
        if self._node is None or self._node[0] != key:
            self._node = None  # Its model goes before the next one comes.
            self._node = key, self._made(run, text, count, list(settings["labels"]))
        return self._node[1]

    def _made(self, run: str, text: str, count: int, labels: list[str]) -> Node:
        recipe = self._recipe(text)
        self._rounds = recipe.rounds
        kind = recipe.deduplication()
        self._kept = Kept(self.state / run / "rows.json", kind) if kind else None
        people = self._population(recipe, labels)
        name = self.policy.name
        self.policy.check(recipe, people.member(name).examples)
        built = recipe.built()
        task = built["task"]
        task.require(people.dataset.column_names)
        model = loading(recipe, task, labels or None)
        # The coordinator knows the recipe's seed, and could take away noise that was drawn from it.
        # Nor may two runs have the same noise, which would go away in their difference.
        secret = seeds.derive(keys.secret(self.state / "secret"), run, text)
        alone = Alone(people, count)
        federation = Federation(recipe.model.name, members=alone, load=model, secret=secret, **built)
        worker = Worker(
            federation.method,
            federation.trainer,
            self._store(run, "private"),
            secret=secret,
            release=self.policy.release,
            on_step=self._signs.step,
            **federation.shared,
        )
        return Node(federation.plan.members.member(name), worker, self._store(run, "pending"), tell=_discreet)

    def _store(self, run: str, what: str) -> ClientStore:
        """Private state of a run on this site's disk."""
        cipher = self._cipher.within(f"{run}/{what}") if self._cipher else None
        return ClientStore(self.state / run / what, cipher=cipher)

    def _recipe(self, text: str) -> Recipe:
        """The recipe that the coordinator sent; it is not trusted."""
        try:
            content = loads(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"the coordinator's recipe is not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(content, dict):
            raise RecipeError("the coordinator's recipe is no mapping of keys")
        return self.policy.recipe(content)

    def _population(self, recipe: Recipe, labels: list[str]) -> Population:
        """The site's rows as one client, without those that a comparison left out."""
        rows = self._rows(labels)
        if self._kept:
            rows = self._kept.of(rows)
        return from_datasets({self.policy.name: rows}, Splits(**recipe.data.splits.model_dump()), recipe.seed)

    def _rows(self, labels: list[str]) -> Dataset:
        """All rows of the site."""
        with chdir(self.folder):  # Paths in the policy are relative to it.
            rows = self.policy.source().load()
        return _numbered(rows, labels) if labels else rows

    def _see_newer(self, settings: Mapping[str, Any]) -> None:
        """Refuse a message that is not newer than all before it, and remember it."""
        sent = settings.get("sent")
        if not isinstance(sent, int) or sent <= self._last:
            raise BadUpdate(f"a message numbered {sent!r} came after {self._last}: it is repeated, or out of order")
        write_bytes(self.state / "last", str(sent).encode())
        self._last = sent

    def _read_last(self) -> int:
        place = self.state / "last"
        try:
            return int(place.read_text()) if place.exists() else 0
        except ValueError as error:
            raise StoreError(f"{place} is damaged: {error}. Restore it from a backup.") from error

    def _acquire(self) -> Any:
        lock = (self.state / ".lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise StoreError(f"another process serves {self.folder}. Stop it first.") from error
        return lock


def _discreet(reason: str) -> str:
    """What goes abroad of the reason why a task failed: the reason itself is for the log, as it may speak of rows."""
    if not reason or reason.startswith("late:"):
        return reason
    log.error("task failed", extra={"about": {"reason": reason}})
    return "its task failed; the site's log says why"


def _numbered(rows: Any, labels: list[str]) -> Any:
    """The rows with classes numbered as all sites number them."""
    if "label" not in rows.column_names:
        return rows
    feature = rows.features["label"]
    classes = isinstance(feature, ClassLabel)
    texts = [feature.int2str(value) if classes else str(value) for value in rows["label"]]
    if unknown := sorted(set(texts) - set(labels)):
        raise DataError(f"label {unknown[0]!r} is not a class of this federation, which has {', '.join(labels)}.")
    numbered = rows.remove_columns("label").add_column("label", [labels.index(text) for text in texts])
    return numbered.cast_column("label", ClassLabel(names=labels))
