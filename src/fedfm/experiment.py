"""A recipe run to its end: the method, its references, the comparison on held-out data, the report."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedfm import parts, report
from fedfm.core.client import View
from fedfm.core.jobs import Generate
from fedfm.core.method import Method, State
from fedfm.core.update import Member, Tensors
from fedfm.data import Population, Splits, federate
from fedfm.errors import DataError, Incompatible, RecipeError
from fedfm.federation import Federation, Outcome
from fedfm.matrix import Matrix
from fedfm.models.load import CLASSIFIERS
from fedfm.observe.observer import Observer
from fedfm.recipe import Recipe, parse
from fedfm.results import results as compared
from fedfm.spaces import Space
from fedfm.store.checkpoint import Checkpoints
from fedfm.store.files import write_bytes, write_json
from fedfm.store.folder import RunFolder
from fedfm.store.plain_yaml import loads
from fedfm.tasks.task import Task


class Experiment:
    """A recipe made ready: data, model and the federations of its method and references.

    Args:
        recipe: what to run.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._built = recipe.built()
        self._running: Federation | None = None
        self._spaces: dict[str, Federation] = {}
        self._stop = False

    @cached_property
    def population(self) -> Population:
        """The clients with their data."""
        data = self.recipe.data
        source, partition = self.recipe.sources()
        return federate(
            source,
            partition,
            splits=Splits(**data.splits.model_dump()),
            seed=self.recipe.seed,
            min_examples=data.min_examples,
            max_examples=data.max_examples,
            max_clients=data.max_clients,
            public=data.public,
            without=data.without,
            deduplicate=self.recipe.deduplication(),
        )

    @cached_property
    def main(self) -> Federation:
        """The federation of the recipe's method."""
        task, people = self._built["task"], self.population
        task.require(people.dataset.column_names)
        model = loading(self.recipe, task, people.label_names)
        known: dict[str, Any] = {"public": people.public, "without": self.recipe.data.without}
        return Federation(self.recipe.model.name, members=people, load=model, **known, **self._built)

    @property
    def settled(self) -> Recipe:
        """The recipe with the noise that its targets take, so that a run goes on with the same number."""
        given = self.main.given
        told: dict[str, Any] = {"stages": tuple(parts.describe(stage) for stage in given["stages"])}
        if self.recipe.privacy is not None:
            told["privacy"] = parts.describe(given["privacy"])
        return self.recipe.model_copy(update=told)

    def refusal(self, method: str) -> str:
        """Why a method cannot run by this recipe; nothing when it can."""
        try:
            one = parts.make("methods", method, "method")
            self.recipe.see_profiles(one)
            self.like(one).start()
        except (Incompatible, RecipeError) as error:
            return str(error)
        return ""

    @cached_property
    def runs(self) -> dict[str, Federation]:
        """All federations by method id, the recipe's own first; they share one model in memory."""
        federations = {self.main.method.id: self.main}
        for position, spec in enumerate(self.recipe.references):
            method = parts.make("methods", spec, f"references.{position}")
            if method.id in federations:
                raise RecipeError(f"references.{position} names {method.id!r}, which runs already.")
            federations[method.id] = self.like(method)
        return {**federations, **{name: run for name, run in self.cells.items() if run is not self.main}}

    @cached_property
    def matrix(self) -> Matrix | None:
        """The table of attacks against defences, if the recipe names any."""
        recipe = self.recipe
        return Matrix(self.main, recipe.attacks, recipe.defences) if recipe.attacks or recipe.defences else None

    @cached_property
    def cells(self) -> dict[str, Federation]:
        """The federations in the table of attacks against defences, by name."""
        return self.matrix.runs() if self.matrix else {}

    def like(self, method: Method) -> Federation:
        """The recipe by another method; all methods of a space share a model in memory."""
        space = self.space(method)
        if space.id not in self._spaces:
            self._spaces[space.id] = self.main.like(method, space)
        return self._spaces[space.id].like(method)

    def space(self, method: Method) -> Space:
        """The recipe's space; for a method that is not defined on it, one that takes the same settings and more."""
        own: Space = self._built["space"]
        for id in method.spaces if own.id not in method.spaces else ():
            kind = parts.find("spaces", id, "space")
            if issubclass(kind, type(own)):
                return kind(**vars(own))
        return own

    def stop(self) -> None:
        """Ask the run to stop; the last finished round stays."""
        self._stop = True
        if self._running:
            self._running.stop()

    def run(
        self, *, resume: bool = False, overwrite: bool = False, observers: Callable[[Path], Sequence[Observer]]
    ) -> dict[str, Any]:
        """Run everything that is still to do and write the run folder.

        Args:
            resume: go on from what the run folder holds.
            overwrite: replace an earlier run.
            observers: makes the observers of the run in a folder.

        Returns:
            The content of ``results.json``, or ``{"status": "stopped"}``.
        """
        cluster = self._cluster()
        every = self.recipe.checkpoints.every
        folder = RunFolder(self.recipe.folder, resume=resume, overwrite=overwrite, every=every)
        try:
            with cluster:
                results = self._run(folder, resume, observers)
            folder.finish("completed" if results else "stopped")
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt)
            folder.finish("stopped" if stopped else "failed", str(error) or type(error).__name__)
            raise
        finally:
            folder.close()
        report.write(folder.path)
        return results or {"status": "stopped"}

    def _cluster(self) -> AbstractContextManager[Any]:
        """Where the clients' work is done during a run: nothing to prepare, or a Ray cluster."""
        if not self.recipe.engine.startswith("ray"):
            return nullcontext()
        if any(run.attack for run in self.runs.values()):
            raise RecipeError("threats are for simulations in one process. Set engine to fused or sequential.")
        if any(run.watermark and run.watermark.in_clients for run in self.runs.values()):
            raise RecipeError(
                f"clients keep keys of {self.recipe.watermark} in one process. Set engine to fused or sequential."
            )
        try:
            from fedfm.links.flower.simulation import Simulation
        except ImportError as error:
            raise RecipeError('engine ray needs Flower and Ray: pip install "fedfm[ray]".') from error
        trainer = self.main.trainer
        settings = {
            "engine": "fused" if self.recipe.engine == "ray-fused" else "sequential",
            "model": self.recipe.model.model_copy(update={"device": trainer.device.type}),
            "training": {**self.recipe.training, "bf16": trainer.bf16},
        }
        recipe = self.settled.model_copy(update=settings)
        return Simulation(Elsewhere(recipe.to_yaml(), os.getcwd(), self.identity()), self.runs)

    def identity(self) -> str:
        """What must be the same wherever clients of this run work: their data, and the packages that make numbers."""
        packages = [f"{name} {version(name)}" for name in ("fedfm", "torch", "transformers", "peft")]
        data = json.dumps(self.population.manifest(), sort_keys=True, default=str)
        return "; ".join([*packages, f"data {hashlib.sha256(data.encode()).hexdigest()[:16]}"])

    def _run(
        self, folder: RunFolder, resume: bool, observers: Callable[[Path], Sequence[Observer]]
    ) -> dict[str, Any] | None:
        self._save_plan(folder, resume)
        watching = {name: observers(self._place(folder, name)) for name in self.runs}
        for observer in watching[self.main.method.id]:
            observer.planned(sum(f.plan.rounds * f.expected_steps() for f in self.runs.values()))
        outcomes: dict[str, Outcome] = {}
        for name, federation in self.runs.items():
            self._running = federation
            place: RunFolder | Path = folder if federation is self.main else self._place(folder, name)
            if not self._stop:
                outcomes[name] = federation.run(place, resume=resume, overwrite=True, observers=watching[name])
            if self._stop or outcomes[name].status == "stopped":
                return None
        results = compared(self, outcomes, {name: self._place(folder, name) for name in outcomes})
        write_json(folder.path / "results.json", results)
        return results

    def _place(self, folder: RunFolder, name: str) -> Path:
        return folder.path if name == self.main.method.id else folder.path / "references" / name

    def _save_plan(self, folder: RunFolder, resume: bool) -> None:
        """Write the recipe and the data's manifest; on resume, see that the data are the same."""
        place = folder.path / "data.json"
        manifest = self.population.manifest()
        before = json.loads(place.read_text())["manifest"] if resume and place.exists() else None
        if before is not None and before != json.loads(json.dumps(manifest)):
            raise RecipeError(
                f"cannot resume: the data are not those of the run in {folder.path}. Restore them, or start a new run "
                "in another output_dir."
            )
        write_json(place, {"summary": self.population.summary(), "manifest": manifest})
        write_bytes(folder.path / "recipe.yaml", self.settled.to_yaml().encode())

    def generate(self, tensors: Tensors, prompts: Sequence[str], max_new_tokens: int = 32) -> list[str]:
        """Greedy answers of the model with these tensors."""
        someone = View(Member("samples", 0), 0)
        return self.main.trainer.answer(Generate(tensors, tuple(prompts), max_new_tokens), someone)


@dataclass(frozen=True)
class Elsewhere:
    """Makes the federations of a recipe in another process.

    Args:
        recipe: as YAML.
        folder: where relative paths of the recipe begin.
        identity: of the experiment there, as it must be.

    Raises:
        RecipeError: data or packages are other ones.
    """

    recipe: str
    folder: str
    identity: str

    def __call__(self) -> dict[str, Federation]:
        """The federations, by the id of their method."""
        if Path(self.folder).is_dir():
            os.chdir(self.folder)
        experiment = Experiment(parse(loads(self.recipe)))
        if (identity := experiment.identity()) != self.identity:
            raise RecipeError(
                f"the machine {platform.node()} has {identity}, but the run has {self.identity}. Give all machines of "
                "the cluster the same packages and data."
            )
        return experiment.runs


def loading(recipe: Recipe, task: Task, label_names: Sequence[str] | None) -> dict[str, Any]:
    """Arguments of :func:`fedfm.models.load` beside the name.

    Args:
        recipe: says which model.
        task: says which head.
        label_names: of the classes in the data; ``None`` where there are none.

    Raises:
        DataError: the task needs classes, and there are none.
    """
    section = recipe.model
    arguments = {"dtype": section.dtype, "revision": section.revision, "device": device(section.device)}
    if task.head not in CLASSIFIERS:
        return arguments
    if label_names is None:
        raise DataError(
            f"task {task.id!r} needs classes in the column label: names or whole numbers, but the data has "
            "other values there. Map another column with data.source.columns: {label: ...}."
        )
    return arguments | {"label_names": label_names}


def device(name: str) -> str:
    """The device that ``name`` means; ``auto`` is the first CUDA device if there is one."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(
            f"model.device {name!r} cannot be used: {str(error).splitlines()[0]} Use auto or cpu."
        ) from error
    return name


def trained(folder: Path, federation: Federation) -> State:
    """The state after the last finished round of the run in ``folder``."""
    kind = type(federation.start())
    found = Checkpoints(folder / "checkpoints").read(kind)
    if found is None:
        raise RecipeError(f"{folder} holds no finished round. Run it first: fedfm run {folder / 'recipe.yaml'}.")
    return found[1]
