"""The coordinator: runs a recipe over sites that keep their rows, and writes the run folder as a run at home does."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from pydantic import Field, ValidationError

from fedfm import parts
from fedfm.core import seeds
from fedfm.core.plan import Members
from fedfm.core.update import Member
from fedfm.dedup.meeting import Meeting
from fedfm.deploy import keys, logs
from fedfm.deploy.bundle import see_deployable
from fedfm.deploy.guard import Guard
from fedfm.deploy.seal import Seal
from fedfm.errors import DataError, FedfmError, RecipeError, StoreError
from fedfm.experiment import Experiment, loading
from fedfm.federation import Federation
from fedfm.links.link import Link
from fedfm.observe.observer import Observer
from fedfm.observe.tensorboard import TensorBoard
from fedfm.recipe import Recipe, Section, read, unknown
from fedfm.store.clients import ClientStore
from fedfm.store.files import write_bytes, write_json
from fedfm.store.folder import RunFolder
from fedfm.store.plain_yaml import mapping
from fedfm.wire.admit import Limits


class Settings(Section):
    """``coordinator.yaml``.

    Args:
        name: of the federation.
        address: ``host:port`` at which sites reach the coordinator.
        listen: ``host:port`` at which the SuperLink listens, and where the coordinator's own commands reach it.
        hosts: names and addresses that the server's certificate holds for.
        least: sites that must be there before a run starts.
        patience_s: seconds for which a run waits for them, and for which a site may be out of reach, or show no
            progress, before it is dropped from the round. It takes part again when it answers.
        deadline_s: seconds after which a round goes on without the sites that have not answered, however they fare.
        enough: answers with which a round goes on at once, without the others; 0 means all. With a sampler that draws
            more sites than that, the slowest of each round do not count.
        max_rows: rows that a site may hand in to be compared with those of others, where the recipe leaves duplicates
            out: with each, a text can be tried.
        metrics: ``HOST:PORT`` at which Prometheus finds numbers of the run; empty means nowhere.
        labels: names of the classes, in the order of their numbers, where the task needs them: no site may choose them.
    """

    name: str = Field(pattern=r"^[a-z][a-z0-9-]{0,31}$")
    address: str = Field(pattern=r"^[^\s:]+:\d{1,5}$")
    listen: str = Field(pattern=r"^[^\s:]+:\d{1,5}$")
    hosts: tuple[str, ...] = ("localhost", "127.0.0.1")
    least: int = Field(1, ge=1)
    patience_s: float = Field(300.0, gt=0)
    deadline_s: float = Field(86400.0, gt=0)
    enough: int = Field(0, ge=0)
    max_rows: int = Field(1_000_000, ge=1)
    metrics: str = ""
    labels: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path) -> Settings:
        """The settings in a file.

        Raises:
            RecipeError: it is absent, no YAML, or has unknown keys or wrong values.
        """
        content = mapping(path, absent="Make the folder first: fedfm deploy init.")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise RecipeError(f"{path}: {unknown(error, cls) or parts.explain(error, '')}") from None


class Coordinator:
    """The coordinator's folder.

    Args:
        folder: with ``coordinator.yaml``, keys, and ``sites/NAME.pub`` for each site; beside it ``app/recipe.yaml``.

    Raises:
        FedfmError: settings, keys or recipe cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.settings = Settings.read(self.folder / "coordinator.yaml")
        self._doing = ""

    @property
    def least(self) -> int:
        """Sites that must be there before a run starts."""
        return self.settings.least

    @cached_property
    def recipe(self) -> Recipe:
        """What is run; its run folder is ``run``, its references are left out, as they need all rows in one place."""
        found = read(self.folder.parent / "app" / "recipe.yaml")
        see_deployable(found)
        return found.model_copy(update={"output_dir": str(self.folder / "run"), "references": ()})

    @cached_property
    def sites(self) -> dict[str, Path]:
        """The public keys of the sites, by name."""
        return {path.stem: path for path in sorted((self.folder / "sites").glob("*.pub")) if "." not in path.stem}

    @cached_property
    def run_id(self) -> str:
        """Name of the run, the same when it is resumed."""
        place = self.folder / "run.id"
        if not place.exists():
            write_bytes(place, uuid.uuid4().hex.encode())
        found = place.read_text().strip()
        if not re.fullmatch(r"[0-9a-f]{32}", found):
            raise RecipeError(f"{place} must hold 32 hexadecimal digits, but holds {found!r}. Restore it.")
        return found

    def check(self, resume: bool) -> None:
        """See that a run can begin: an earlier one, and with it what sites keep for it, is never given up in passing.

        Raises:
            StoreError: there is an earlier run, and it is not to be resumed.
        """
        place = self.folder / "run"
        if not resume and place.exists() and any(path.name != ".lock" for path in place.iterdir()):
            raise StoreError(f"{place} holds an earlier run. Go on with it by --resume, or move that folder away.")

    def begin(self, resume: bool) -> None:
        """Name a new run, unless an earlier one is resumed.

        Raises:
            StoreError: as :meth:`check`.
        """
        self.check(resume)
        if not resume:
            for name in ("run.id", "compared.json"):
                (self.folder / name).unlink(missing_ok=True)
        logs.begin(self.folder / "log.jsonl")

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Log why a run fails within it: the run folder may be what cannot be written."""
        try:
            yield
        except Exception as error:
            reason = str(error) or type(error).__name__
            logs.log.exception("run failed", extra={"about": {"run": self.run_id, "reason": reason}})
            raise

    def tell(self, doing: str) -> None:
        """Note what the run is waiting for, for the log and for those who ask; nothing means that it waits no more."""
        if doing != self._doing:
            self._doing = doing
            text = json.dumps({"since": time.time(), "for": doing})
            write_bytes(self.folder / "waiting.json", text.encode(), durable=False)
            if doing:
                logs.log.info("waiting", extra={"about": {"run": self.run_id, "for": doing}})

    @cached_property
    def delivery(self) -> dict[str, Any]:
        """How long to wait, and for how many: arguments of :class:`fedfm.links.flower.server.Delivery`."""
        settings = self.settings
        return {
            "patience_s": settings.patience_s,
            "deadline_s": settings.deadline_s,
            "enough": settings.enough,
            "spool": self.folder / "spool",
            "most_bytes": parts.build(Limits, self.recipe.limits, "limits").max_upload_bytes,
            "tell": self.tell,
        }

    @cached_property
    def seal(self) -> Seal:
        """Its signing key, and the sites' public keys."""
        others = {name: keys.public(path) for name, path in self.sites.items()}
        if not others:
            raise RecipeError(f"{self.folder / 'sites'} holds no site's key. Put NAME.pub of each site there.")
        return Seal(keys.private(self.folder / "signing.key"), others)

    def guard(self) -> Guard:
        """Signs messages of this run and checks replies."""
        # Paths of this machine are nobody's business; a site has rows of its own.
        source = self.recipe.data.source
        if not isinstance(source, str) and "path" in source:
            source = {**source, "path": Path(source["path"]).name}
        data = self.recipe.data.model_copy(update={"source": source})
        sent = self.recipe.model_copy(update={"output_dir": "run", "samples": 0, "data": data})
        common = {
            "run": self.run_id,
            "recipe": sent.to_yaml(),
            "members": len(self.seal.others),
            "labels": list(self.settings.labels),
        }
        return Guard(self.seal, common, self.folder / "audit.jsonl")

    def run(self, members: Members, link: type[Link], resume: bool) -> dict[str, Any]:
        """Run what is still to do.

        Args:
            members: the sites that are there.
            link: reaches them.
            resume: go on from the last finished round.

        Returns:
            The content of ``results.json``, or ``{"status": "stopped"}``.
        """
        secret = seeds.derive(keys.secret(self.folder / "secret"), self.run_id)  # no two runs have the same noise
        if self.recipe.data.deduplicate is not None:
            members = self.compared(members, link)
        experiment = Deployed(self.recipe, members, link, self.settings.labels, secret)

        watching: list[Observer] = [logs.RoundLog(self.run_id)]
        if self.settings.metrics:
            from fedfm.observe.prometheus import Prometheus

            watching.append(Prometheus(self.settings.metrics))

        def observers(folder: Path) -> Sequence[Observer]:
            return (TensorBoard(folder / "tensorboard"), *watching)

        return experiment.run(resume=resume, overwrite=False, observers=observers)

    def compared(self, members: Members, link: type[Link]) -> Compared:
        """The sites whose rows were compared, once in a run; a run that goes on tells each the same once more.

        Raises:
            FedfmError: fewer are left than a run needs; says who was dropped, and why.
        """
        place = self.folder / "compared.json"
        limits = parts.build(Limits, self.recipe.limits, "limits")
        asks = link(self.recipe.built()["method"], None, ClientStore(), seed=self.recipe.seed)
        meeting = Meeting(asks, members, self.run_id, self.seal, limits)
        noted = json.loads(place.read_text()) if place.exists() else None
        if noted is None:
            found = meeting.compared(self.recipe.deduplication(), self.settings.max_rows)
            noted = {"left_out": found, "dropped": dict(meeting.dropped)}
            if len(noted["left_out"]) >= self.least:
                write_json(place, noted)  # Before anybody is told: a run that goes on must say the same.
        left = meeting.told(noted["left_out"]) if len(noted["left_out"]) >= self.least else {}
        dropped = {**noted["dropped"], **meeting.dropped}
        if len(left) < self.least:
            why = "".join(f"; {site!r} was dropped: {reason}" for site, reason in sorted(dropped.items()))
            raise FedfmError(f"the rows of {self.least} sites must be compared, but those of {len(left)} were{why}")
        for site, reason in sorted(dropped.items()):
            logs.log.warning("dropped", extra={"about": {"run": self.run_id, "site": site, "reason": reason}})
        gone = {site: len(noted["left_out"][site]) for site in left}
        return Compared(
            {site: replace(members.member(site), examples=count) for site, count in left.items()},
            {site: count for site, count in gone.items() if count},
            sorted(dropped),
        )


@dataclass(frozen=True)
class Compared:
    """The sites whose rows were compared.

    Args:
        members: each with the training rows that it has left.
        duplicates: how many rows each leaves out, where it does.
        dropped: sites that take no part.
    """

    members: Mapping[str, Member]
    duplicates: Mapping[str, int]
    dropped: Sequence[str]

    @property
    def ids(self) -> Sequence[str]:
        return sorted(self.members)

    def member(self, id: str) -> Member:
        return self.members[id]

    def rows(self, id: str, split: str) -> NoReturn:
        raise DataError(f"the rows of client {id!r} are on its own machine; the server has none")

    def pooled(self) -> Members:
        raise DataError("the clients' rows are on their own machines; nobody can pool them")


class Deployed(Experiment):
    """A recipe over members whose rows are elsewhere.

    Args:
        recipe: what to run.
        members: who is there.
        link: reaches them.
        labels: names of the classes.
        secret: seed of the noise that the server adds: the recipe's seed is known to all.
    """

    def __init__(
        self, recipe: Recipe, members: Members, link: type[Link], labels: Sequence[str] = (), secret: int | None = None
    ) -> None:
        super().__init__(recipe)
        self._built["secret"] = secret
        self.members = members
        self.link = link
        self.labels = labels

    @cached_property
    def main(self) -> Federation:
        """The federation of the recipe's method."""
        model = loading(self.recipe, self._built["task"], self.labels or None)
        return Federation(self.recipe.model.name, members=self.members, load=model, link=self.link, **self._built)

    def _save_plan(self, folder: RunFolder, resume: bool) -> None:
        """Write the recipe, and who takes part with how many examples; rows are not known here."""
        counts = {id: {"train": self.members.member(id).examples} for id in self.main.ids}
        sizes = sorted(c["train"] for c in counts.values())
        middle = sizes[len(sizes) // 2]
        summary = {
            "clients": len(sizes),
            "rows": sum(sizes),
            "per_client": {"min": sizes[0], "median": middle, "max": sizes[-1]},
            "counts": counts,
            "left_out": [],
        }
        if isinstance(self.members, Compared):
            summary |= {"left_out": self.members.dropped, "duplicates": self.members.duplicates}
        write_json(folder.path / "data.json", {"summary": summary, "manifest": {"clients": sorted(counts)}})
        write_bytes(folder.path / "recipe.yaml", self.settled.to_yaml().encode())

    def samples(self, after: Any) -> list[dict[str, str]]:
        """None: held-out rows stay at the sites."""
        return []
