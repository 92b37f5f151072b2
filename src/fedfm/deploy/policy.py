"""What a site allows: in which recipes it takes part, and what may leave it.

A policy is a file of the site's own. A recipe comes from the coordinator and is not trusted; nothing in it widens a
policy. Three questions are put to one:

====================== =========================== ============================================================
method                 when                        what it sees
====================== =========================== ============================================================
:meth:`Policy.recipe`  a recipe has arrived        code of its own, before anything of it is imported or made
:meth:`Policy.check`   before the model is loaded  the same; model, task, method, parts, local steps, privacy, rows
:meth:`Policy.release` before an update is sent    names, metrics and size
====================== =========================== ============================================================
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from fedfm import composition, parts
from fedfm.core import traits
from fedfm.core.method import Method
from fedfm.core.plan import Members, Plan
from fedfm.core.traits import Trait
from fedfm.core.update import Member, Update
from fedfm.deploy import release
from fedfm.errors import RecipeError
from fedfm.parts import Spec
from fedfm.privacy.dp_sgd import DPSGD
from fedfm.recipe import Recipe, Section, parse, unknown
from fedfm.sample.uniform import Uniform
from fedfm.schedule.synchronous import Synchronous
from fedfm.store.plain_yaml import mapping
from fedfm.wire import codec
from fedfm.wire.distributed_gaussian import DistributedGaussian
from fedfm.wire.gaussian import Gaussian
from fedfm.wire.local_gaussian import LocalGaussian
from fedfm.wire.stage import Setting
from fedfm.wire.tree_gaussian import TreeGaussian

_SINGLE = ("method", "space", "task", "sampler", "secure", "rule", "mean", "schedule", "privacy", "threat", "watermark")
_SEVERAL = ("stages", "screens", "audits", "references", "attacks", "defences")
"""Keys of a recipe that hold parts."""

_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:\[\]]+):([0-9]{1,5})")
_HUB = re.compile(r"[\w-][\w.-]{0,95}(/[\w-][\w.-]{0,95})?", re.ASCII)


class Refused(RecipeError):
    """A recipe or an update that a site's policy does not allow; names the key, what it allows and what came."""


class Policy(Section):
    """What a site allows.

    Args:
        name: of the site and of its client.
        coordinator: ``host:port`` of the SuperLink.
        data: the site's rows: a source of :mod:`fedfm.data`, such as ``{kind: file, path: rows.jsonl}``.
        models: base models that may be loaded, by name or pattern; a file or folder only by its name, word for word.
        tasks: kinds of tasks, as patterns.
        methods: kinds of methods, as patterns.
        tensors: names of tensors that may leave, as patterns of :mod:`fedfm.core.trees`.
        max_upload_bytes: encoded size of one update.
        min_examples: training rows that the site must have.
        max_steps: optimizer steps of one training, as the recipe's ``training``, its profiles and the method's plan
            have them; 0 means no bound.
        require_stages: stages that uploads must pass, by kind.
        secure: kinds of secure aggregation, as patterns, of which the recipe must name one; empty asks for none.
        deduplicate: kinds of deduplication, as patterns, for which rows may be compared with those of other sites; with
            none, a recipe that asks for it is refused.
        max_left_out: the largest share of the rows that a run may leave out as duplicates.
        max_epsilon: the most that the run may spend of $\\varepsilon$ of the site; ``None`` asks for no guarantee.
        max_example_epsilon: the same of each of the site's examples.
        max_delta: the largest $\\delta$ at which these count: at one near 1, every $\\varepsilon$ is small.
        scores: whether sums over held-out rows may leave, by which a model is scored; stages do not change them.
        state_key: file with the key under which private state is written to disk; empty writes it as it is.
        own_code: whether a recipe may name parts as ``package.module:Class``, which are imported.
    """

    name: str
    coordinator: str
    data: Spec
    models: list[str]
    tasks: list[str] = ["*"]
    methods: list[str] = ["*"]
    tensors: list[str] = ["*.lora_A.*", "*.lora_B.*"]
    max_upload_bytes: int = Field(256 << 20, ge=1)
    min_examples: int = Field(1, ge=0)
    max_steps: int = Field(0, ge=0)
    require_stages: list[str] = []
    secure: list[str] = []
    deduplicate: list[str] = []
    max_left_out: float = Field(0.5, gt=0, le=1)
    max_epsilon: float | None = Field(None, gt=0, allow_inf_nan=False)
    max_example_epsilon: float | None = Field(None, gt=0, allow_inf_nan=False)
    max_delta: float = Field(1e-5, gt=0, lt=1)
    scores: bool = True
    state_key: str = ""
    own_code: bool = False

    @field_validator("name")
    @classmethod
    def _readable(cls, value: str) -> str:
        if not (value.strip() and value.isprintable()):
            raise PydanticCustomError("name", "must be a name in one line")
        return value

    @field_validator("coordinator")
    @classmethod
    def _address(cls, value: str) -> str:
        found = _ADDRESS.fullmatch(value)
        if not (found and 0 < int(found[2]) < 65536):
            raise PydanticCustomError("address", "must be HOST:PORT, such as fl.example.org:9092")
        return value

    @field_validator("models")
    @classmethod
    def _some(cls, value: list[str]) -> list[str]:
        if not value:
            raise PydanticCustomError("models", "must name at least one model")
        return value

    def source(self) -> Any:
        """The source of the site's rows.

        Raises:
            RecipeError: ``data`` names none.
        """
        found = parts.make("data", self.data, "data")
        if not hasattr(found, "load"):
            known = sorted(kind for kind, cls in parts.kinds("data").items() if hasattr(cls, "load"))
            raise RecipeError(f"data must be a source of rows, one of {', '.join(known)}, but is {self.data!r}.")
        return found

    def recipe(self, content: dict[str, Any]) -> Recipe:
        """The recipe in a mapping that the coordinator sent, when it is known that it names no code of its own.

        To make a part of the form ``package.module:Class`` is to import it, so this comes before anything is made.

        Raises:
            Refused: it names such a part and ``own_code`` is not set.
            RecipeError: it is no recipe, or a part cannot be made.
        """
        try:
            found = Recipe.model_validate(content)
        except ValidationError:
            return parse(content)  # raises, with what is wrong in words, before it makes a part
        self._see_code(found)
        return parse(content)

    def check(self, recipe: Recipe, examples: int) -> None:
        """See that the site may take part in a run.

        Args:
            recipe: what is to be run.
            examples: the site's training rows.

        Raises:
            Refused: the policy does not allow it.
            RecipeError: a part of the recipe cannot be made, or the method cannot run by it.
        """
        self._see_code(recipe)
        if recipe.threat or recipe.attacks:
            raise Refused(
                f"site {self.name!r} refuses: the recipe names a threat, which is for simulations in one process. No "
                "policy allows it; leave threat and attacks out."
            )
        self._see_model(recipe.model.name)
        self._see_kind("tasks", self.tasks, "task", recipe.task)
        self._see_kind("methods", self.methods, "method", recipe.method)
        if examples < self.min_examples:
            came = f"there are {examples} training rows"
            raise self._refused("min_examples", f"no run with fewer than {self.min_examples} training rows", came)
        built = recipe.built()
        method = built["method"]
        own = composition.composed(method, {name: built[name] for name in composition.NOTHING})
        alone = _Alone(Member(self.name, examples))
        plan = method.plan(Plan(alone, built["sampler"], built["training"], recipe.rounds))
        self._see_stages(own)
        self._see_secure(own)
        self._see_comparison(recipe)
        self._see_steps(plan, recipe, examples)
        self._see_privacy(method, own, plan)
        self._see_examples(own["privacy"], plan, examples)

    def release(self, update: Update) -> None:
        """See that an update may leave the site, as :mod:`fedfm.deploy.release` says, and is not too large.

        Raises:
            Refused: it may not.
        """
        if (name := release.strange_metric(update)) is not None:
            allowed = f"no metrics but the numbers {', '.join(sorted(release.METRICS))}"
            raise Refused(f"site {self.name!r} refuses: it sends {allowed}, but the update has {_shown(name)}.")
        if release.scores(update) and not self.scores:
            raise self._refused("scores", "no scores to leave, which bear no noise", "the task is to score a model")
        if not release.scores(update) and (name := release.strange_tensor(update.tensors, self.tensors)) is not None:
            came = f"the update has a tensor {_shown(name)}"
            raise self._refused("tensors", f"only {', '.join(self.tensors) or 'none'} to leave", came)
        self.see_size(update)

    def see_size(self, update: Update) -> None:
        """See that an update is not too large.

        Raises:
            Refused: it is.
        """
        size = codec.size(update)
        if size > self.max_upload_bytes:
            came = f"the update has {size} bytes"
            raise self._refused("max_upload_bytes", f"at most {self.max_upload_bytes} bytes to leave at once", came)

    def see_left_out(self, count: int, rows: int) -> None:
        """See that a run does not leave out too many rows as duplicates.

        Raises:
            Refused: it does.
        """
        if count > self.max_left_out * rows:
            came = f"{count} of {rows} are to go"
            raise self._refused("max_left_out", f"{self.max_left_out:.3g} of the rows to be left out", came)

    def _refused(self, key: str, allowed: str, came: str) -> Refused:
        return Refused(
            f"site {self.name!r} refuses: its policy's {key} allows {allowed}, but {came}. "
            "Change the recipe, or ask the site to change its policy."
        )

    def _see_code(self, recipe: Recipe) -> None:
        """See that no part is code of somebody's own. Makes nothing, so nothing is imported."""
        if self.own_code:
            return
        for where, spec in _specs(recipe):
            if ":" in _kind(spec):
                came = f"the recipe's {where} is {_shown(_kind(spec))}"
                raise self._refused("own_code", "no parts of the form package.module:Class", came)

    def _see_model(self, name: str) -> None:
        if name in self.models:
            return
        # What looks like a Hub id but is there as a folder would be read from it.
        elsewhere = _HUB.fullmatch(name) and not name.endswith((".gguf", ".safetensors")) and not Path(name).exists()
        if elsewhere and any(fnmatchcase(name, pattern) for pattern in self.models):
            return
        came = f"the recipe's model.name is {_shown(name)}"
        if not elsewhere:
            came += ", and a file or folder must be listed there word for word"
        raise self._refused("models", f"only {', '.join(self.models)}", came)

    def _see_kind(self, key: str, patterns: Sequence[str], where: str, spec: Spec) -> None:
        kind = _kind(spec)
        if not any(fnmatchcase(kind, pattern) for pattern in patterns):
            raise self._refused(key, f"only {', '.join(patterns) or 'none'}", f"the recipe's {where} is {_shown(kind)}")

    def _see_stages(self, own: Mapping[str, Any]) -> None:
        there = {parts.describe(stage)["kind"] for stage in own["stages"]}
        if missing := [kind for kind in self.require_stages if kind not in there]:
            wanted = f"only recipes with the stages {', '.join(self.require_stages)}"
            raise self._refused("require_stages", wanted, f"the recipe has no stage {missing[0]!r}")

    def _see_secure(self, own: Mapping[str, Any]) -> None:
        if not self.secure:
            return
        kind = parts.describe(own["secure"])["kind"] if own["secure"] else ""
        if not any(fnmatchcase(kind, pattern) for pattern in self.secure):
            came = f"the recipe's secure is {_shown(kind)}" if kind else "the recipe has no secure"
            raise self._refused("secure", f"only recipes with secure of {', '.join(self.secure)}", came)

    def _see_comparison(self, recipe: Recipe) -> None:
        """See that rows may be compared with those of others, and that no guarantee is asked for which that breaks."""
        if (spec := recipe.data.deduplicate) is None:
            return
        self._see_kind("deduplicate", self.deduplicate, "data.deduplicate", spec)
        for key in ("max_epsilon", "max_example_epsilon"):
            if (most := getattr(self, key)) is not None:
                came = "by data.deduplicate its rows decide on which rows others train, and of that no epsilon speaks"
                raise self._refused(key, f"an epsilon of at most {most:g}", came)

    def _see_steps(self, plan: Plan, recipe: Recipe, examples: int) -> None:
        if not self.max_steps:
            return
        try:
            # A profile is drawn from the recipe's values, so the largest of them may be this client's.
            factor = max(recipe.profiles.get("work", (1.0,)))
            steps = float(max(1, round(plan.training.steps(examples) * factor)))
        except (OverflowError, ValueError):
            steps = math.inf
        if steps > self.max_steps:
            came = f"the recipe's training takes {steps:.9g} steps with {examples} training rows"
            raise self._refused("max_steps", f"at most {self.max_steps} optimizer steps of one task", came)

    def _see_privacy(self, method: Method, own: Mapping[str, Any], plan: Plan) -> None:
        """See that a stage keeps what training sends within the budget.

        Of ``gaussian`` the guarantee is the coordinator's, who adds the noise and draws who takes part; of
        ``local-gaussian`` it is the site's own; of ``distributed-gaussian`` that of the sites that are summed, each of
        which adds a part. All suppose that who wants to know of the rows cannot draw the same noise again. Scores of
        held-out rows pass no stage and are not counted.
        """
        if self.max_epsilon is None:
            return
        allowed = f"an epsilon of at most {self.max_epsilon:g} at a delta of at most {self.max_delta:g}"
        why, least = "no stage of the recipe gives such a guarantee", math.inf
        try:
            traits.check(method, own["stages"])
            for stage in own["stages"]:
                if isinstance(stage, (Gaussian, LocalGaussian)) and stage.delta <= self.max_delta:
                    least = min(least, _epsilon(stage, method, own, plan))
                    why = f"the recipe spends {least:.4g} in {plan.rounds} rounds"
                    if math.isinf(least):
                        why = "for this method and schedule none can be worked out"
        except RecipeError as error:
            why, least = f"none can be worked out ({str(error).rstrip('.')})", math.inf
        if not least <= self.max_epsilon:
            raise self._refused("max_epsilon", allowed, why)

    def _see_examples(self, privacy: DPSGD | None, plan: Plan, examples: int) -> None:
        """See that training here protects single examples; the guarantee is the site's own, which adds the noise."""
        if self.max_example_epsilon is None:
            return
        allowed = f"an epsilon of at most {self.max_example_epsilon:g} at a delta of at most {self.max_delta:g}"
        if privacy is None or privacy.delta > self.max_delta:
            raise self._refused("max_example_epsilon", allowed, "privacy of the recipe gives no such guarantee")
        spent = privacy.epsilon(plan.training, [Member(self.name, examples)], plan.rounds)
        if not spent <= self.max_example_epsilon:
            came = f"the recipe spends {spent:.4g} in {plan.rounds} rounds"
            raise self._refused("max_example_epsilon", allowed, came)


def read(path: Path) -> Policy:
    """The policy in a YAML file.

    Raises:
        RecipeError: no such file, no YAML, an unknown key or a wrong value.
    """
    content = mapping(path, absent="Make it: fedfm deploy init; or restore it.")
    try:
        found = Policy.model_validate(content)
        found.source()
    except ValidationError as error:
        raise RecipeError(f"the policy {path}: {unknown(error, Policy) or parts.explain(error, '')}") from None
    except RecipeError as error:
        raise RecipeError(f"the policy {path}: {error}") from None
    return found


@dataclass(frozen=True)
class _Alone:
    """This site as the only member, for methods that change the plan of a run.

    Plans that gather the work of several rounds give one client alone the most of it.

    Args:
        own: the site's client.
    """

    own: Member

    @property
    def ids(self) -> list[str]:
        return [self.own.id]

    def member(self, id: str) -> Member:
        return self.own

    def rows(self, id: str, split: str) -> Sequence[Mapping[str, Any]]:
        return ()

    def pooled(self) -> Members:
        return self


def _epsilon(stage: Gaussian | LocalGaussian, method: Method, own: Mapping[str, Any], plan: Plan) -> float:
    """The most that a run spends at the stage's own delta, whatever the number of clients; infinite if not known."""
    # Other schedules ask a client more than once before they act.
    if not (own["schedule"] is None or isinstance(own["schedule"], Synchronous)) or Trait.ONE_ASK not in method.traits:
        return math.inf
    if isinstance(stage, LocalGaussian):
        return stage.epsilon(Setting(own["stages"], plan.sampler, 1), plan.rounds)
    sampler = plan.sampler
    drawn = isinstance(sampler, Uniform) and (sampler.count or sampler.fraction < 1)
    if drawn and not isinstance(stage, (TreeGaussian, DistributedGaussian)):
        # What a fixed sample gains depends on how many clients there are, which a site cannot see. So nothing is
        # gained here, and replacing one client by another changes the sum by twice the bound.
        half = replace(stage, noise_multiplier=stage.noise_multiplier / 2, accountant="pld")
        spent = half.epsilon(Uniform(), 1, plan.rounds)
    else:
        # Of everybody, of Poisson and of a tree it is the same for any number; of those who take turns it is the most.
        spent = stage.epsilon(sampler, 1, plan.rounds)
    # The run stops at its budget, by the account of its first such stage.
    noisy = [s for s in own["stages"] if isinstance(s, Gaussian)]
    budget = max(s.max_epsilon for s in noisy)
    return min(spent, budget) if budget and stage is noisy[0] else spent


def _specs(recipe: Recipe) -> Iterator[tuple[str, Spec]]:
    """All parts that a recipe names, with the key."""
    for key in _SINGLE:
        if spec := getattr(recipe, key):
            yield key, spec
    for key in _SEVERAL:
        yield from ((f"{key}.{position}", spec) for position, spec in enumerate(getattr(recipe, key)))
    yield "data.source", recipe.data.source
    yield "data.partition", recipe.data.partition
    if recipe.data.deduplicate is not None:
        yield "data.deduplicate", recipe.data.deduplicate


def _kind(spec: Spec) -> str:
    return spec if isinstance(spec, str) else str(spec.get("kind", ""))


def _shown(value: str) -> str:
    """What came, no longer than a line."""
    return f"{value!r:.100}"
