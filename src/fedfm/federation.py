"""A federation: built from parts, checked, run and resumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedfm import compatibility, composition
from fedfm.attack.attack import Attack, Poisoned
from fedfm.attack.threat import Threat
from fedfm.core import traits
from fedfm.core.client import View
from fedfm.core.jobs import Fit
from fedfm.core.mean import WeightedMean
from fedfm.core.method import Mean, Method, Rule, State
from fedfm.core.plan import Members, Plan, Profiled, Sampler, Training
from fedfm.core.space import Layout
from fedfm.core.traits import Trait
from fedfm.core.update import Member, Tensors
from fedfm.data.names import Ids
from fedfm.errors import RecipeError, Stopped
from fedfm.evaluate.assessment import Assessment, Evaluation
from fedfm.evaluate.scoring import Scoring
from fedfm.links.inprocess import InProcess
from fedfm.links.link import Link
from fedfm.observe.observer import Observer
from fedfm.ownership.marking import Marking
from fedfm.ownership.watermark import Watermark
from fedfm.privacy import ledger
from fedfm.privacy.dp_sgd import DPSGD
from fedfm.robust.screen import Screen
from fedfm.rounds import Outcome, Rounds
from fedfm.rules.add import Add
from fedfm.sample.uniform import Uniform
from fedfm.schedule.schedule import Schedule
from fedfm.schedule.synchronous import Synchronous
from fedfm.spaces.lora import LoRA
from fedfm.spaces.space import Space
from fedfm.store.clients import ClientStore
from fedfm.store.folder import RunFolder
from fedfm.tasks.task import Task
from fedfm.train.bench import Bench
from fedfm.train.fused import Fused
from fedfm.train.trainer import Trainer
from fedfm.value.audit import Audit
from fedfm.wire.admit import Limits
from fedfm.wire.stage import Setting, Stage

if TYPE_CHECKING:
    from fedfm.models import Loaded
    from fedfm.secure.secure import Secure


class Federation:
    """Clients that train together by a method.

    Args:
        model: a model as :func:`fedfm.models.load` understands it, or one already loaded.
        method: the federated method.
        members: the clients and their data.
        task: what is learnt.
        space: what is tuned.
        training: local training.
        rounds: rounds of the run.
        sampler: who takes part in a round.
        rule: how the combined update changes the weights.
        stages: done to every upload, in this order.
        secure: how uploads are summed so that the server sees their sum alone; each by itself unless given.
        mean: estimator of the mean of the uploads.
        schedule: when the server acts.
        evaluation: scores during training.
        limits: what is accepted from a client.
        seed: of every random draw.
        secret: seed of the noise that the server adds, where others know ``seed``; ``seed`` unless given.
        load: further arguments of :func:`fedfm.models.load`.
        link: how clients are reached.
        screens: which uploads the server takes into account, in this order.
        audits: shown all that the server sees of each round; what they find is in the round's record.
        public: rows that the server and all clients have.
        profiles: what a client says of its device, by key: each client has one of the values, drawn by its name.
        privacy: how clients protect single examples.
        threat: what hostile clients do; in simulation only.
        watermark: marks by which it can be told later whose the model is.
        engine: how jobs are answered.
        without: ids of clients who were among the members and have left; their places in the draws of the sampler
            stay empty.

    Raises:
        Incompatible: the parts do not compose.
        RecipeError: an argument cannot be used.
    """

    def __init__(
        self,
        model: str | Loaded | Bench,
        method: Method,
        members: Members,
        task: Task,
        *,
        space: Space | None = None,
        training: Training | None = None,
        rounds: int = 10,
        sampler: Sampler | None = None,
        rule: Rule | None = None,
        stages: Sequence[Stage] = (),
        secure: Secure | None = None,
        mean: Mean | None = None,
        screens: Sequence[Screen] = (),
        audits: Sequence[Audit] = (),
        schedule: Schedule | None = None,
        public: Sequence[Mapping[str, Any]] = (),
        profiles: Mapping[str, Sequence[float]] | None = None,
        privacy: DPSGD | None = None,
        threat: Threat | None = None,
        watermark: Watermark | None = None,
        engine: type[Trainer] = Fused,
        evaluation: Evaluation | None = None,
        limits: Limits | None = None,
        seed: int = 0,
        secret: int | None = None,
        load: Mapping[str, Any] | None = None,
        link: type[Link] = InProcess,
        without: Sequence[str] = (),
    ) -> None:
        if rounds < 1:
            raise RecipeError(f"rounds must be at least 1, but is {rounds}.")
        self.profiles = dict(profiles or {})
        people: Members = Profiled(members, self.profiles, seed) if self.profiles else members
        self.attack = Attack(threat, sorted(people.ids), seed, self.classes) if threat else None
        if self.attack:
            people = Poisoned(people, self.attack)
        self.base_plan = Plan(people, sampler or Uniform(), training or Training(), rounds)
        self.members = members
        self.plan = method.plan(self.base_plan)
        # What the user chose, for other methods on the same clients; what the method brings is added below.
        self.given: dict[str, Any] = self._settled(
            {
                "rule": rule,
                "mean": mean,
                "stages": tuple(stages),
                "secure": secure,
                "screens": tuple(screens),
                "schedule": schedule,
                "audits": tuple(audits),
                "privacy": privacy,
                "threat": threat,
                "watermark": watermark,
            }
        )
        own = self._settled(composition.composed(method, self.given))
        self.model = model
        self.method = method
        self.task = task
        self.space = space or LoRA()
        self.rule: Rule = own["rule"] or Add()
        self.stages: tuple[Stage, ...] = own["stages"]
        self.secure: Secure | None = own["secure"]
        self.mean: Mean = own["mean"] or WeightedMean()
        self.screens: tuple[Screen, ...] = own["screens"]
        self.schedule: Schedule = own["schedule"] or Synchronous()
        self.audits: tuple[Audit, ...] = own["audits"]
        self.privacy: DPSGD | None = own["privacy"]
        self.threat: Threat | None = own["threat"]
        self.watermark: Watermark | None = own["watermark"]
        self.marking = Marking(self.watermark, self) if self.watermark else None
        self._given_public = public
        self.public = self.attack.public(public) if self.attack else public
        self.engine = engine
        self.evaluation = evaluation or Evaluation()
        self.limits = limits or Limits()
        self.seed = seed
        self.secret = seed if secret is None else secret
        self._load = dict(load or {})
        self.link = link
        named = self.plan.members.ids
        # A million names as Python texts would take a second and 64 MB; these are made when they are looked at.
        self.ids: Sequence[str] = named.ordered() if isinstance(named, Ids) else sorted(named)
        self.without = frozenset(without)
        # Clients that a method has pooled have no places of their own.
        own_places = self.without and self.plan.members is self.base_plan.members
        self.places: Sequence[str] = sorted(self.without.union(self.ids)) if own_places else self.ids
        self.setting = Setting(self.stages, self.plan.sampler, len(self.places))
        self.composition = self.check()
        self.scoring = Scoring(self)
        self._stop = False
        self._observers: Sequence[Observer] = ()

    def _settled(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        """The parts with the noise worked out that their targets take, so that a run has one number from first to
        last."""
        own = parts["privacy"]
        return {
            **parts,
            "stages": tuple(stage.settled(self.plan) for stage in parts["stages"]),
            "privacy": own.settled(self.plan) if own else None,
        }

    def check(self) -> list[traits.Link]:
        """How the parts compose, line by line.

        Raises:
            Incompatible: they do not.
        """
        return compatibility.check(self)

    @property
    def protecting(self) -> dict[str, list[str]]:
        """The names of the parts that protect, by what they do (:func:`fedfm.composition.protecting`)."""
        return composition.protecting(self.method, {name: getattr(self, name) for name in composition.NOTHING})

    def classes(self) -> int:
        """How many classes the task has; 0 where it has none."""
        from fedfm.models.load import CLASSIFIERS

        if words := getattr(self.task, "verbalizer", ()):
            return len(words)
        return int(self.bench.loaded.model.config.num_labels) if self.task.head in CLASSIFIERS else 0

    @cached_property
    def layout(self) -> Layout:
        """The tuned tensors, as every party knows them."""
        space = self.bench.space
        initial = self.threat.initial(space.initial, self._pretrain) if self.threat else space.initial
        return Layout(initial, len(self.places), self.seed, self.plan.rounds, space.frozen)

    def _pretrain(self, tensors: Tensors, steps: int) -> Tensors:
        """Tensors after so many steps on the public rows."""
        job = Fit(tensors, train=self.method.train, split="public", max_steps=steps, purpose="pretrain")
        return self.trainer.answer(job, View(Member("server", len(self.public)), 1)).tensors

    @property
    def plainly_averaged(self) -> bool:
        """Whether the method alone decides what the server makes of the uploads of a round, and sees each of them."""
        plain = self.rule == Add() and isinstance(self.mean, WeightedMean) and not self.screens
        visible = Trait.VISIBLE in self.composition[-1].after
        same = self.watermark is None or not self.watermark.in_messages
        return plain and visible and same and isinstance(self.schedule, Synchronous)

    def drawn(self, round: int) -> list[str]:
        """Who takes part in a round. Others are drawn as if nobody had left."""
        chosen = self.plan.sampler.sample(self.places, round, self.seed)
        return [id for id in chosen if id not in self.without] if self.without else chosen

    def start(self) -> State:
        """The state before the first round."""
        return self.method.start(self.layout)

    def result(self, state: State) -> Tensors:
        """The tensors of the global model."""
        return self.method.result(state, self.layout)

    def spent(self, rounds: int) -> dict[str, dict[str, float]]:
        """``epsilon`` and ``delta`` after so many rounds with which ``noise_multiplier``, by whom they protect:
        ``clients`` or single ``examples``."""
        return ledger.spent(self, rounds)

    @property
    def budgets(self) -> dict[str, float]:
        """The most that may be spent, by whom it protects; nothing where there is no bound."""
        return ledger.budgets(self.stages, self.privacy)

    @cached_property
    def bench(self) -> Bench:
        """The model with the space in it; loaded when first needed."""
        if isinstance(self.model, Bench):
            return self.model
        if isinstance(self.model, str):
            from fedfm.models import load

            loaded = load(self.model, head=self.task.head, seed=self.seed, **self._load)
        else:
            loaded = self.model
        return Bench.of(loaded, self.space, self.seed)

    @cached_property
    def trainer(self) -> Trainer:
        """Answers the jobs of the clients that take part."""
        return self._trainer(self.plan.members)

    @cached_property
    def judge(self) -> Trainer:
        """Answers the jobs of the clients as they are without the method's plan, such as before pooling."""
        same = self.plan.members is self.base_plan.members
        return self.trainer if same else self._trainer(self.base_plan.members)

    def _trainer(self, members: Members) -> Trainer:
        return self.engine(
            self.bench.loaded,
            self.bench.space,
            self.task,
            self.plan.training,
            members,
            trunk=self.bench.trunk if self.plan.training.cache_frozen_blocks else None,
            packer=self.bench.packer if self.plan.training.padding_free else None,
            public=self.public,
            privacy=self.privacy,
            seed=self.seed,
            secret=self.secret,
            rounds=self.plan.rounds,
        )

    def like(self, method: Method, space: Space | None = None, **more: Any) -> Federation:
        """The same federation by another method, with the model that is already in memory, and without a watermark.

        Args:
            method: the method.
            space: another one.
            more: parts beside those that there are, by the argument of a federation that they go to.

        A method of another space works in a model of its own, as a model has one space at a time. A method that pools
        the clients is a reference without a federation around it: stages and server rules, which are about clients'
        uploads, are left out for it.
        """
        given: dict[str, Any] = {} if method.simulated_only else {**self.given, "audits": (), "watermark": None}
        for name, part in more.items():
            if not isinstance(part, tuple) and given[name] is not None:
                raise RecipeError(f"there is a {name} already ({type(given[name]).__name__}). Leave it out.")
            given[name] = (*given[name], *part) if isinstance(part, tuple) else part
        other = space is not None and space != self.space
        arguments = self._arguments | given | {"space": space or self.space}
        return Federation(self.model if other else self.bench, method, self.members, **arguments)

    def on(self, members: Members, **changed: Any) -> Federation:
        """The same federation on other clients, with the model that is already in memory; nothing is scored while it
        trains.

        Args:
            members: the clients.
            changed: arguments of a federation that differ.
        """
        arguments = self._arguments | self.given | {"audits": (), "evaluation": Evaluation(every=0)} | changed
        return Federation(self.bench, self.method, members, **arguments)

    @property
    def _arguments(self) -> dict[str, Any]:
        """What this federation was built with, beside its model, method, members and parts."""
        return {
            "task": self.task,
            "space": self.space,
            "training": self.base_plan.training,
            "rounds": self.base_plan.rounds,
            "sampler": self.base_plan.sampler,
            "evaluation": self.evaluation,
            "limits": self.limits,
            "seed": self.seed,
            "secret": self.secret,
            "link": self.link,
            "public": self._given_public,
            "profiles": self.profiles,
            "engine": self.engine,
            "load": self._load,
            "without": sorted(self.without),
        }

    def expected_steps(self) -> float:
        """Optimizer steps of one round, over all its clients, on average."""
        some = self.ids[:: max(1, len(self.ids) // 100)]
        steps = [self.plan.training.steps(self.plan.members.member(i).examples) for i in some]
        return self.plan.sampler.expected(len(self.ids)) * sum(steps) / len(steps)

    def stop(self) -> None:
        """Ask a running :meth:`run` to stop; the last finished round stays."""
        self._stop = True

    def run(
        self,
        folder: RunFolder | Path | str | None = None,
        *,
        resume: bool = False,
        overwrite: bool = False,
        observers: Sequence[Observer] = (),
    ) -> Outcome:
        """Run all rounds that are still to do.

        Args:
            folder: the run folder; ``None`` keeps everything in memory.
            resume: go on from the last checkpoint in ``folder``.
            overwrite: replace an earlier run in ``folder``.
            observers: told what happens.

        Raises:
            FedfmError: the run failed; ``status.json`` says why.
        """
        if isinstance(folder, (str, Path)):
            opened = RunFolder(folder, resume=resume, overwrite=overwrite)
            try:
                outcome = Rounds(self, opened, observers).run(resume)
                opened.finish(outcome.status)
                return outcome
            except BaseException as error:
                stopped = isinstance(error, KeyboardInterrupt)
                opened.finish("stopped" if stopped else "failed", str(error) or type(error).__name__)
                raise
            finally:
                opened.close()
        return Rounds(self, folder, observers).run(resume)

    def assess(self, state: State, phase: str = "test", store: ClientStore | None = None) -> Assessment | None:
        """Score every client's model, also of a method that pools clients, by ``validate`` or ``test``.

        Args:
            state: the server's state.
            phase: which split.
            store: clients' private state; ``None`` when they have none.
        """
        return self.scoring.assess(state, phase, store)

    def validate(self, link: Link, state: State) -> Assessment | None:
        """Score the clients that are scored during training."""
        return self.scoring.validate(link, state)

    def probe(
        self, state: State, phase: str = "test", *, store: ClientStore | None = None, link: Link | None = None
    ) -> float | None:
        """How often honest clients' models give the answer that the attacker wants: the share of their held-out rows.

        Args:
            state: the server's state.
            phase: ``test``, or ``validate`` for the clients that are scored during training.
            store: clients' private state; ``None`` when they have none.
            link: to the clients; a new one by default.

        Returns:
            ``None`` where no answer is wanted, or nobody has a row to try it on.
        """
        return self.scoring.probe(state, phase, store=store, link=link)

    def save(self, state: State, folder: Path) -> None:
        """Write the global model: a PEFT adapter folder, or a whole model for the full space."""
        if tensors := self.result(state):
            self.bench.space.save(tensors, folder)

    def connect(self, store: ClientStore, observers: Sequence[Observer] = ()) -> Link:
        """The clients as the server reaches them in a run.

        Args:
            store: their private state.
            observers: told of steps.
        """
        self._stop, self._observers = False, observers
        return self.reach(store, self.trainer)

    @property
    def shared(self) -> dict[str, Any]:
        """What the server and the workers of its clients must have alike, as arguments of a link or worker."""
        return {
            "stages": self.stages,
            "secure": self.secure,
            "seed": self.seed,
            "layout": self.layout,
            "hide_metrics": Trait.VISIBLE not in self.composition[-1].after,
            "timeout_s": self.limits.timeout_s,
            **({"attack": self.attack} if self.attack else {}),
            **({"marking": self.marking} if self.watermark and self.watermark.in_clients else {}),
        }

    def reach(self, store: ClientStore, trainer: Trainer) -> Link:
        """The clients, whose jobs a trainer answers."""
        return self.link(self.method, trainer, store, **self.shared, on_step=self.stepped)

    def stepped(self, steps: int) -> None:
        """Tell observers of optimizer steps of clients; raises ``Stopped`` when the user asked for it."""
        if self._stop:
            raise Stopped("stopped by the user")
        if steps:
            for observer in self._observers:
                observer.stepped(steps)
