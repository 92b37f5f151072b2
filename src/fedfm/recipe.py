"""A recipe: one YAML file that says what is run, and what it becomes.

    model: smollm2-135m-instruct
    method: fedit
    space: {kind: lora, r: 8}
    task: chat
    data:
      source: chatterbot
      partition: {kind: natural, column: topic}
    training: {max_steps: 8, learning_rate: 1.0e-3}
    rounds: 5

A *part* (``method``, ``space``, ...) is its kind, or a mapping with ``kind`` and settings. An unknown key is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fedfm import parts
from fedfm.core.plan import Training
from fedfm.errors import RecipeError, nearest
from fedfm.evaluate.assessment import Evaluation
from fedfm.parts import Spec
from fedfm.store.plain_yaml import loads
from fedfm.wire.admit import Limits

_FOLDERS = {
    "rule": "rules",
    "mean": "robust",
    "schedule": "schedule",
    "stages": "wire",
    "secure": "secure",
    "screens": "robust",
    "audits": "value",
    "privacy": "privacy",
    "threat": "attack",
    "attacks": "attack",
    "watermark": "ownership",
}
"""Where the parts of a key are."""


class Section(BaseModel):
    """A mapping in a recipe; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class ModelSection(Section):
    """Which model.

    Args:
        name: embedded name, Hub id, folder, or .gguf or .safetensors file.
        dtype: of the weights in memory.
        revision: branch, tag or commit on the Hub.
        device: where it runs; ``auto`` is the first CUDA device, or the CPU.
    """

    name: str
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    revision: str | None = None
    device: str = "auto"


class SplitsSection(Section):
    """Parts of each client's rows that are held out."""

    validation: float = Field(0.1, ge=0, lt=1)
    test: float = Field(0.2, ge=0, lt=1)
    group_by: str = "prompt"


class DataSection(Section):
    """Whose data.

    Args:
        source: where rows come from.
        partition: which rows belong to which client.
        splits: fractions of each client's rows that are held out.
        min_examples: clients with fewer rows are left out.
        max_examples: rows of a client beyond this number are left out; ``None`` means no bound.
        max_clients: clients beyond this number are left out; ``None`` means no bound.
        public: fraction of the rows that no client gets, and the server and all clients have.
        deduplicate: of rows that match, in whatever client, one stays: ``exact`` or ``near``.
        without: names of clients who have left: none of their rows is looked at, and their places in the draws of the
            sampler stay empty.
    """

    source: Spec
    partition: Spec
    splits: SplitsSection = SplitsSection()  # type: ignore[call-arg]
    min_examples: int = Field(0, ge=0)
    max_examples: int | None = Field(None, ge=1)
    max_clients: int | None = Field(None, ge=1)
    public: float = Field(0.0, ge=0, lt=1)
    deduplicate: Spec | None = None
    without: tuple[str, ...] = ()


class CheckpointSection(Section):
    """What stays of a run beside its last two rounds.

    Args:
        every: the checkpoints of rounds that this number divides, with what clients had then, so that a client who
            leaves later need not send all to the start; 0 means none.
    """

    every: int = Field(0, ge=0)


EVERYWHERE = frozenset({"work", "speed"})
"""Keys of profiles that count for every method."""


class Recipe(Section):
    """A whole run.

    Args:
        name: of the run; the run folder is ``runs/NAME`` unless ``output_dir`` says otherwise.
        title: heading of the report.
        secure: how uploads are summed so that the server sees their sum alone, such as ``secagg``.
        mean: estimator of the mean of the uploads; that of the method, or the weighted mean, unless named.
        screens: which uploads the server takes into account.
        audits: what looks at each round.
        privacy: how clients protect single examples, such as ``dp-sgd``.
        profiles: what clients' devices are like: for each key values, of which each client has one. With unequal values
            of ``rank`` and no method named, the method is ``flora-stacking``, which aggregates them exactly.
        engine: clients are trained together where that changes nothing, or one after the other; with ``ray`` before it
            by the workers of a Ray cluster, where ``ray`` alone means one after the other.
        threat: what hostile clients do, such as ``sign-flip``; in simulation only.
        attacks: threats under each of which it is run, beside a run without any; see ``defences``.
        watermark: marks by which it can be told later whose the model is, such as ``waffle``.
        defences: screens, estimators, stages and schedules with each of which it is run, beside a run without any:
            together with ``attacks``, a table of each attack against each defence. A setting ``hostile`` that is not
            given is the number of hostile clients.
        references: methods run beside it at the same budget, for comparison.
        samples: dialogues shown before and after training.
        checkpoints: which rounds' checkpoints stay.
    """

    name: str = "run"
    title: str = ""
    seed: int = 0
    model: ModelSection
    method: Spec = "fedavg"
    space: Spec = "lora"
    task: Spec
    data: DataSection
    training: dict[str, Any] = {}
    rounds: int = Field(10, ge=1)
    sampler: Spec = "uniform"
    rule: Spec | None = None
    stages: tuple[Spec, ...] = ()
    secure: Spec | None = None
    mean: Spec | None = None
    screens: tuple[Spec, ...] = ()
    schedule: Spec | None = None
    audits: tuple[Spec, ...] = ()
    privacy: Spec | None = None
    threat: Spec | None = None
    attacks: tuple[Spec, ...] = ()
    defences: tuple[Spec, ...] = ()
    watermark: Spec | None = None
    profiles: dict[str, tuple[float, ...]] = {}
    engine: Literal["fused", "sequential", "ray", "ray-fused"] = "fused"
    evaluation: dict[str, Any] = {}
    limits: dict[str, Any] = {}
    references: tuple[Spec, ...] = ()
    samples: int = Field(3, ge=0)
    checkpoints: CheckpointSection = CheckpointSection()  # type: ignore[call-arg]
    output_dir: str = ""

    @field_validator("model", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _exact(cls, content: Any) -> Any:
        """Where clients have unequal ranks and no method is named, their factors are aggregated without loss."""
        profiles = content.get("profiles") if isinstance(content, dict) else None
        ranks = profiles.get("rank") if isinstance(profiles, dict) else None
        unequal = isinstance(ranks, (list, tuple)) and any(rank != ranks[0] for rank in ranks)
        return {"method": "flora-stacking", **content} if unequal else content

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.output_dir or f"runs/{self.name}")

    def built(self) -> dict[str, Any]:
        """The parts that the recipe names, ready to use, by the argument of ``Federation`` they go to."""
        from fedfm.train import Fused, Trainer

        if empty := [key for key, values in self.profiles.items() if not values]:
            raise RecipeError(f"profiles.{empty[0]} has no values. Give it some, such as [2, 4, 8].")
        method = parts.make("methods", self.method, "method")
        self.see_profiles(method)
        return {
            "method": method,
            "space": parts.make("spaces", self.space, "space"),
            "task": parts.make("tasks", self.task, "task"),
            "training": parts.build(Training, self.training, "training"),
            "rounds": self.rounds,
            "sampler": parts.make("sample", self.sampler, "sampler"),
            **self._optional("secure", "rule", "mean", "schedule", "privacy", "threat", "watermark"),
            **self._several("stages", "screens", "audits"),
            "profiles": self.profiles,
            "engine": Fused if self.engine in ("fused", "ray-fused") else Trainer,
            "evaluation": parts.build(Evaluation, self.evaluation, "evaluation"),
            "limits": parts.build(Limits, self.limits, "limits"),
            "seed": self.seed,
        }

    def see_profiles(self, method: Any) -> None:
        """See that each key of the profiles means something to a method.

        Raises:
            RecipeError: one does not, so that clients would all be alike; names methods to which it does.
        """
        for key in sorted(self.profiles.keys() - EVERYWHERE - method.reads):
            readers = sorted(i for i, cls in parts.kinds("methods").items() if key in cls.reads)  # type: ignore[attr-defined]
            known = sorted(EVERYWHERE.union(*(cls.reads for cls in parts.kinds("methods").values())))  # type: ignore[attr-defined]
            tip = f"It is read by {', '.join(readers)}." if readers else f"Keys that are read: {', '.join(known)}."
            raise RecipeError(f"profiles.{key} means nothing to the method {method.id}.{nearest(key, known)} {tip}")

    def _optional(self, *keys: str) -> dict[str, Any]:
        """Parts that need not be named."""
        given = {key: getattr(self, key) for key in keys}
        return {key: parts.make(_FOLDERS[key], spec, key) if spec else None for key, spec in given.items()}

    def _several(self, *keys: str) -> dict[str, Any]:
        """Parts of which there may be many."""
        return {
            key: tuple(parts.make(_FOLDERS[key], s, f"{key}.{i}") for i, s in enumerate(getattr(self, key)))
            for key in keys
        }

    def sources(self) -> tuple[Any, Any]:
        """The data's source and partition."""
        return (
            parts.make("data", self.data.source, "data.source"),
            parts.make("data", self.data.partition, "data.partition"),
        )

    def deduplication(self) -> Any:
        """How rows are deduplicated; ``None`` where they are not."""
        spec = self.data.deduplicate
        return parts.make("dedup", spec, "data.deduplicate") if spec is not None else None

    def resolved(self) -> dict[str, Any]:
        """The recipe with every setting spelled out."""
        built, (source, partition) = self.built(), self.sources()
        out = self.model_dump(mode="json") | {"output_dir": str(self.folder)}
        single = ("method", "space", "task", "sampler", "secure", "rule", "mean", "schedule", "privacy", "threat")
        for key in (*single, "watermark"):
            out[key] = parts.describe(built[key]) if built[key] is not None else None
        for key in ("training", "evaluation", "limits"):
            out[key] = dict(vars(built[key]))
        for key in ("stages", "screens", "audits"):
            out[key] = [parts.describe(s) for s in built[key]]
        if self.threat and (self.attacks or self.defences):
            raise RecipeError(
                "threat is one attack on the run and attacks are many, each on a run of its own. Leave one out."
            )
        out["attacks"] = [parts.describe(one) for one in self._several("attacks")["attacks"]]
        out["references"] = [
            parts.describe(parts.make("methods", r, f"references.{i}")) for i, r in enumerate(self.references)
        ]
        out["data"] |= {"source": parts.describe(source), "partition": parts.describe(partition)}
        if (deduplication := self.deduplication()) is not None:
            out["data"]["deduplicate"] = parts.describe(deduplication)
        return out

    def to_yaml(self) -> str:
        """The resolved recipe as YAML that :func:`read` accepts."""
        return yaml.safe_dump(self.resolved(), sort_keys=False, allow_unicode=True, width=100)


def read(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file.

    Args:
        path: the file.
        overrides: changes such as ``training.learning_rate=1e-3``; values are YAML.

    Raises:
        RecipeError: no such file, no YAML, an unknown key or a wrong value.
    """
    path = Path(path)
    try:
        content = loads(path.read_text())
    except FileNotFoundError:
        near = sorted(str(p) for p in (path.parent if path.parent.is_dir() else Path()).glob("*.yaml"))
        raise RecipeError(f"there is no recipe {path}.{nearest(str(path), near)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}.") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"the recipe {path} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise RecipeError(f"the recipe {path} must be a mapping of keys, such as model: and task:.")
    if "name" not in content:
        content["name"] = path.stem
    return parse(content, overrides)


def parse(content: dict[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a mapping, with overrides applied."""
    for override in overrides:
        _override(content, override)
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(unknown(error, Recipe, "the recipe") or parts.explain(error, "")) from None
    recipe.resolved()
    return recipe


def unknown(error: ValidationError, section: type[Section], name: str = "it") -> str:
    """A sentence on the first unknown key, if that is what is wrong.

    Args:
        error: what pydantic found.
        section: what was read.
        name: what to call it.
    """
    for problem in error.errors(include_url=False):
        if problem["type"] == "extra_forbidden":
            *above, key = map(str, problem["loc"])
            for part in above:
                inner = section.model_fields[part].annotation
                section = inner if isinstance(inner, type) and issubclass(inner, Section) else section
            known = sorted(section.model_fields)
            place = ".".join(above) or name
            return f"{place} has no key {key!r}.{nearest(key, known)} It takes {', '.join(known)}."
    return ""


def _override(content: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise RecipeError(f"--set takes KEY=VALUE, such as training.max_steps=4, but got {override!r}.")
    try:
        value = loads(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"the value in --set {override} is not YAML: {' '.join(str(error).split())}.") from error
    *above, last = path.split(".")
    at: dict[str, Any] = content
    for key in above:
        below = at.get(key, {})
        if isinstance(below, str):
            below = {"name" if key == "model" else "kind": below}
        if not isinstance(below, dict):
            raise RecipeError(f"--set {override}: {key} is {below!r}, which has no keys.")
        at[key] = below
        at = below
    at[last] = value
