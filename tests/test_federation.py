"""Whole runs of a tiny model: the numbers, the dropped, the resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file

from fedfm.core import trees
from fedfm.core.client import View
from fedfm.core.jobs import Fit
from fedfm.core.method import Client, Method, State, Work
from fedfm.core.plan import Training
from fedfm.core.traits import Trait, Traits
from fedfm.core.update import Tensors, Update
from fedfm.errors import ClientError, FedfmError, Incompatible, RecipeError, StoreError
from fedfm.evaluate import Evaluation
from fedfm.federation import Federation
from fedfm.links.inprocess import InProcess
from fedfm.methods.centralised import Centralised
from fedfm.methods.fedavg import FedAvg
from fedfm.methods.local_only import LocalOnly
from fedfm.methods.lora.fedit import FedIT
from fedfm.observe import Observer
from fedfm.rules import Add
from fedfm.sample import Poisson, Uniform
from fedfm.spaces import Full
from fedfm.wire import Clip
from fedfm.wire.admit import Limits
from fedfm.wire.codec import encode, tensors_size
from tests.conftest import FAST, People, dialogue

Make = Callable[..., Federation]


def same(a: Tensors, b: Tensors, tolerance: float = 0.0) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[n], b[n]) if not tolerance else torch.allclose(a[n], b[n], atol=tolerance, rtol=0) for n in a
    )


def test_fedavg_is_the_weighted_mean_of_what_clients_learn(federation: Make, people: People) -> None:
    made = federation(FedIT(), rounds=1)
    weights = made.run().state.weights
    fits = {c: made.trainer.answer(Fit({}), View(people.member(c), 1)).tensors for c in people.ids}
    for name, tensor in weights.items():  # 6, 3 and 4 examples
        wanted = (6 * fits["ann"][name] + 3 * fits["bob"][name] + 4 * fits["cid"][name]) / 13
        torch.testing.assert_close(tensor, wanted, rtol=1e-5, atol=1e-6)
    # The product of the means is not the mean of the products: the inexactness that FedIT accepts.
    a, b = (next(n for n in weights if f in n) for f in ("lora_A", "lora_B"))
    mean_product = sum(n / 13 * fits[c][b] @ fits[c][a] for c, n in (("ann", 6), ("bob", 3), ("cid", 4)))
    assert (weights[b] @ weights[a] - mean_product).abs().max() > 1e-6


def test_weighting_by_clients(federation: Make, people: People) -> None:
    made = federation(FedAvg(weighting="clients"), rounds=1)
    weights = made.run().state.weights
    fits = [made.trainer.answer(Fit({}), View(people.member(c), 1)).tensors for c in people.ids]
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, sum(f[name] for f in fits) / 3, rtol=1e-5, atol=1e-6)


def test_one_client_is_plain_training(federation: Make, people: People) -> None:
    made = federation(FedAvg(), members=people.only("bob"), rounds=1, space=Full())
    alone = made.trainer.answer(Fit({}), View(people.member("bob"), 1)).tensors
    assert same(made.run().state.weights, alone, 1e-7)


def test_the_order_of_clients_changes_nothing(federation: Make, people: People) -> None:
    turned = People({c: people.data[c] for c in reversed(people.ids)})
    assert same(federation(FedIT()).run().state.weights, federation(FedIT(), members=turned).run().state.weights)


def test_payload_is_what_the_record_says(federation: Make) -> None:
    made = federation(FedIT(), rounds=1)
    outcome = made.run()
    record = outcome.records[1]
    names = set(made.bench.space.initial)
    assert all("lora_" in n for n in names)
    expected_down = 3 * tensors_size(outcome.state.weights)
    assert record["bytes_down"] == expected_down
    update = Update(
        outcome.state.weights, 6, {"loss": record["participants"]["ann"]["loss"], "steps": 2, "examples": 4}
    )
    assert record["participants"]["ann"]["bytes_up"] == len(encode(update))
    assert record["bytes_up"] == sum(p["bytes_up"] for p in record["participants"].values())


def test_local_only_sends_nothing_and_ignores_others(federation: Make, people: People, tmp_path: Path) -> None:
    everyone = federation(LocalOnly()).run(tmp_path / "all")
    assert [(r["bytes_up"], r["bytes_down"]) for r in everyone.records[1:]] == [(0, 0), (0, 0)]
    assert everyone.state.weights == {}
    other = [dialogue("other", "rows")] * 5
    changed = People({**people.data, "bob": {"train": other, "validation": other, "test": other}})
    federation(LocalOnly(), members=changed).run(tmp_path / "changed")
    kept = {run: load_file(tmp_path / run / "clients/ann/00000002.safetensors") for run in ("all", "changed")}
    assert same(kept["all"], kept["changed"])
    # Two rounds of a client alone are two rounds of FedAvg with that client alone.
    solo = federation(FedAvg(), members=people.only("ann")).run().state.weights
    assert same(kept["all"], solo, 1e-6)


def test_centralised_is_one_client_with_all_data(federation: Make, people: People) -> None:
    made = federation(Centralised(), rounds=1)
    assert made.plan.training.max_steps == 3 * FAST.max_steps
    pooled = people.pooled()
    assert len(pooled.rows("all", "train")) == 13
    by_hand = federation(FedAvg(), members=pooled, rounds=1, training=replace(FAST, max_steps=6))
    assert same(made.run().state.weights, by_hand.run().state.weights)
    # Its model is scored on every client's own rows.
    scores = made.assess(made.start())
    assert scores is not None
    assert list(scores.clients) == ["ann", "bob", "cid"]


def test_centralised_by_epochs_and_fractions_has_the_same_budget(federation: Make) -> None:
    epochs = Training(num_train_epochs=2, per_device_train_batch_size=1)
    made = federation(Centralised(), training=epochs, sampler=Uniform(count=1))
    assert made.plan.training.num_train_epochs == pytest.approx(2 / 3)
    assert made.expected_steps() == round(13 * 2 / 3)


def test_federated_sgd_with_one_step_is_centralised_sgd(federation: Make, people: People) -> None:
    """Full batches, one step a round, answers of one length: the mean gradient is the gradient of the union."""

    def rows(habit: str, n: int) -> list[dict[str, object]]:
        return [dialogue(habit * (i + 1), "abc") for i in range(n)]

    level = People({c: {"train": rows(c, n), "validation": [], "test": []} for c, n in (("p", 2), ("q", 4))})
    args = Training(max_steps=1, optim="sgd", learning_rate=0.5, max_grad_norm=0, per_device_train_batch_size=6)
    settings = {"training": args, "rounds": 3, "evaluation": Evaluation(every=0)}
    together = federation(FedAvg(), members=level, **settings).run().state.weights
    union = federation(FedAvg(), members=level.pooled(), **settings).run().state.weights
    assert same(together, union, 1e-6)


@dataclass(frozen=True)
class Misbehaving(FedIT):
    """Bob does not do as he is told."""

    deed: str = "nan"

    def local(self, client: Client, message: Tensors) -> Work:
        update = yield from super().local(client, message)
        if client.member.id != "bob":
            return update
        first = next(iter(update.tensors))
        broken = {
            "nan": {**update.tensors, first: update.tensors[first] * float("nan")},
            "shape": {**update.tensors, first: update.tensors[first].flatten()},
            "missing": {n: t for n, t in update.tensors.items() if n != first},
            "huge": trees.scale(update.tensors, 1e12),
        }
        if self.deed == "weight":
            return replace(update, weight=-1)
        if self.deed == "memory":
            raise MemoryError("cannot allocate")
        return replace(update, tensors=broken[self.deed])


@pytest.mark.parametrize(
    ("deed", "reason"),
    [
        ("nan", "is not finite"),
        ("shape", "has shape"),
        ("missing", "is missing"),
        ("huge", "has a norm above"),
        ("weight", "weight -1"),
        ("memory", "MemoryError: cannot allocate"),
    ],
)
def test_a_bad_client_is_dropped_and_named(federation: Make, people: People, deed: str, reason: str) -> None:
    outcome = federation(Misbehaving(deed=deed)).run()
    for record in outcome.records[1:]:
        [dropped] = record["dropped"]
        assert dropped["client"] == "bob"
        assert reason in dropped["reason"]
        assert set(record["participants"]) == {"ann", "cid"}
    without = federation(FedIT(), members=people.only("ann", "cid")).run()
    assert same(outcome.state.weights, without.state.weights)


@dataclass(frozen=True)
class FailsOnce(FedIT):
    """Clients count their tasks; bob fails in round 1."""

    traits: ClassVar[Traits] = FedIT.traits - {Trait.FORGETFUL}

    def local(self, client: Client, message: Tensors) -> Work:
        client.keep({"count": client.private.get("count", torch.zeros(1)) + 1})
        if client.member.id == "bob" and client.round == 1:
            raise MemoryError("cannot allocate")
        return (yield from super().local(client, message))


def test_a_round_with_too_few_updates_does_not_count(federation: Make, tmp_path: Path) -> None:
    """Neither the model nor what clients keep moves, and after three of them the run fails."""
    made = federation(FailsOnce(), rounds=1, limits=Limits(min_clients=3))
    assert same(made.run().state.weights, made.start().weights)
    outcome = federation(FailsOnce(), rounds=2, limits=Limits(min_clients=3)).run(tmp_path / "run")
    assert [[d["client"] for d in r["dropped"]] for r in outcome.records[1:]] == [["bob"], []]
    kept = {
        place.name: float(load_file(sorted(place.glob("*.safetensors"))[-1])["count"])
        for place in (tmp_path / "run" / "clients").iterdir()
    }
    assert kept == {"ann": 1, "bob": 1, "cid": 1}
    with pytest.raises(FedfmError, match="too few updates could be used in 3 rounds in a row"):
        federation(Misbehaving(deed="memory"), rounds=5, limits=Limits(min_clients=3)).run()


def test_with_enough_updates_a_round_counts(federation: Make) -> None:
    some = federation(Misbehaving(deed="memory"), limits=Limits(min_clients=2)).run()
    assert same(some.state.weights, federation(Misbehaving(deed="memory")).run().state.weights)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"min_clients": 0}, "limits.min_clients must be above 0"),
        ({"max_norm": float("nan")}, "limits.max_norm must be above 0 and finite"),
        ({"max_weight": float("inf")}, "limits.max_weight"),
        ({"max_upload_bytes": -1}, "limits.max_upload_bytes"),
        ({"timeout_s": -1.0}, "limits.timeout_s must be at least 0"),
    ],
)
def test_limits_that_bound_nothing_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        Limits(**changes)


def test_an_oversize_upload_is_dropped(federation: Make) -> None:
    with pytest.raises(
        FedfmError, match=r"every client was dropped in 3 rounds in a row.*'ann'.*bytes are more than the 100"
    ):
        federation(FedIT(), rounds=5, limits=Limits(max_upload_bytes=100)).run()


def test_a_late_client_is_dropped(federation: Make, people: People) -> None:
    made = federation(FedIT(), rounds=1, evaluation=Evaluation(every=0), limits=Limits(timeout_s=1000))
    link = made.reach
    slow = {"now": 0.0}

    def patched(store, trainer):  # type: ignore[no-untyped-def]
        inner = link(store, trainer)
        inner.worker.clock = lambda: slow["now"]
        answer = trainer.answer

        def work(job, client):  # type: ignore[no-untyped-def]
            slow["now"] += 2000 if client.member.id == "bob" else 1
            return answer(job, client)

        trainer.answer = work
        return inner

    made.reach = patched  # type: ignore[method-assign]
    outcome = made.run()
    [dropped] = outcome.records[1]["dropped"]
    assert dropped["client"] == "bob"
    assert "late: 2000.0 s are more than the 1000 s allowed" in dropped["reason"]
    without = federation(FedIT(), members=people.only("ann", "cid"), rounds=1, evaluation=Evaluation(every=0)).run()
    assert same(outcome.state.weights, without.state.weights, 1e-6)


@dataclass(frozen=True)
class Buggy(FedIT):
    """A defect of the method, not of a client."""

    def local(self, client: Client, message: Tensors) -> Work:
        fitted = yield Fit(message)
        return Update(fitted.no_such_field)


def test_a_defect_ends_the_run_and_says_where(federation: Make, tmp_path: Path) -> None:
    with pytest.raises(ClientError, match=r"client 'ann', round 1, task 'local', job none: AttributeError") as caught:
        federation(Buggy()).run(tmp_path / "run")
    assert isinstance(caught.value.__cause__, AttributeError)
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["status"] == "failed"
    assert "AttributeError" in status["reason"]


def test_an_empty_client_is_dropped(federation: Make, people: People) -> None:
    with_empty = People({**people.data, "nil": {"train": [], "validation": [], "test": []}})
    outcome = federation(FedIT(), members=with_empty).run()
    assert outcome.records[1]["dropped"] == [
        {"client": "nil", "reason": "client 'nil' has no training example from which there is something to learn"}
    ]
    assert same(outcome.state.weights, federation(FedIT()).run().state.weights, 1e-6)


def test_an_empty_poisson_round_leaves_the_weights(federation: Make) -> None:
    made = federation(FedIT(), sampler=Poisson(rate=1e-9), rounds=5)
    outcome = made.run()
    assert [r["participants"] for r in outcome.records[1:]] == [{}] * 5
    assert same(outcome.state.weights, made.bench.space.initial)


class StopAfter(Observer):
    """Stops the run in the middle of a round."""

    def __init__(self, federation: Federation, steps: int) -> None:
        self.federation, self.left = federation, steps

    def stepped(self, steps: int) -> None:
        self.left -= steps
        if self.left <= 0:
            self.federation.stop()


@pytest.mark.parametrize("method", [FedIT(), LocalOnly()], ids=lambda m: m.id)
def test_stopped_and_resumed_equals_uninterrupted(federation: Make, tmp_path: Path, method: Method) -> None:
    whole = federation(method, rounds=4)
    expected = whole.run(tmp_path / "whole")
    first = federation(method, rounds=4)
    stopped = first.run(tmp_path / "cut", observers=[StopAfter(first, 2 * 6 + 3)])  # in the third round
    assert stopped.status == "stopped"
    assert json.loads((tmp_path / "cut/status.json").read_text())["status"] == "stopped"
    assert len(stopped.records) == 3
    resumed = federation(method, rounds=4).run(tmp_path / "cut", resume=True)
    assert same(resumed.state.weights, expected.state.weights)
    timeless = ("round", "train_loss", "validation", "bytes_up", "bytes_down", "dropped")
    assert [[r.get(k) for k in timeless] for r in resumed.records] == [
        [r.get(k) for k in timeless] for r in expected.records
    ]
    for state in sorted((tmp_path / "whole/clients").glob("*/*4.safetensors")):
        assert same(load_file(state), load_file(tmp_path / "cut/clients" / state.parent.name / state.name))
    assert json.loads((tmp_path / "cut/status.json").read_text())["status"] == "completed"


def test_resume_refuses_another_plan(federation: Make, tmp_path: Path) -> None:
    federation(FedIT()).run(tmp_path / "run")
    with pytest.raises(RecipeError, match=r"cannot resume: training was .*Restore it, or start a new run"):
        federation(FedIT(), training=replace(FAST, learning_rate=1.0)).run(tmp_path / "run", resume=True)
    with pytest.raises(StoreError, match=r"holds an earlier run.*--resume.*--overwrite"):
        federation(FedIT()).run(tmp_path / "run")


def test_more_rounds_may_be_added(federation: Make, tmp_path: Path) -> None:
    federation(FedIT(), rounds=2).run(tmp_path / "run")
    longer = federation(FedIT(), rounds=3).run(tmp_path / "run", resume=True)
    assert same(longer.state.weights, federation(FedIT(), rounds=3).run().state.weights)


def test_the_final_folder_is_a_peft_adapter(federation: Make, llama_folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    made = federation(FedIT())
    outcome = made.run(tmp_path / "run")
    made.bench.space.load(outcome.state.weights)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        wanted = made.bench.loaded.model.eval()(ids).logits
        base = AutoModelForCausalLM.from_pretrained(llama_folder)
        before = base(ids).logits
        got = PeftModel.from_pretrained(base, tmp_path / "run/final").eval()(ids).logits
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert (before - wanted).abs().max() > 1e-4


@dataclass(frozen=True)
class FrozenA(FedIT):
    """FFA-LoRA's roles: only B is trained and travels."""

    train: ClassVar[trees.Patterns] = ("lora_B",)
    share: ClassVar[trees.Patterns] = ("lora_B",)


@dataclass(frozen=True)
class PrivateB(FedIT):
    """FedSA-LoRA's roles: both are trained, only A travels."""

    share: ClassVar[trees.Patterns] = ("lora_A",)
    traits: ClassVar[Traits] = Method.traits - {Trait.FORGETFUL}


def test_roles_of_tensors(federation: Make, tmp_path: Path) -> None:
    frozen = federation(FrozenA())
    assert all("lora_B" in n for n in frozen.run().state.weights)
    made = federation(PrivateB())
    outcome = made.run(tmp_path / "run")
    assert all("lora_A" in n for n in outcome.state.weights)
    kept = {c: load_file(tmp_path / f"run/clients/{c}/00000002.safetensors") for c in ("ann", "bob")}
    assert all("lora_B" in n for tensors in kept.values() for n in tensors)
    assert not same(kept["ann"], kept["bob"])


def test_stages_work_on_every_upload(federation: Make) -> None:
    made = federation(FedIT(), rounds=1, stages=(Clip(max_norm=1e-3),))
    weights = made.run().state.weights
    moved = trees.norm(trees.subtract(weights, made.bench.space.initial))
    assert 0 < moved <= 1e-3 + 1e-9


def test_wrong_compositions_are_refused_when_built(federation: Make) -> None:
    with pytest.raises(Incompatible, match=r"FedIT is defined on the space lora, not on full.*space.kind to lora"):
        federation(FedIT(), space=Full())


def test_another_method_gets_the_same_federation_around_it(federation: Make) -> None:
    made = federation(FedIT(), stages=(Clip(max_norm=1e-3),), rule=Add(learning_rate=0.5), secret=7)
    other = made.like(FedAvg())
    assert (other.stages, other.rule, other.mean, other.schedule) == (made.stages, made.rule, made.mean, made.schedule)
    assert other.secret == 7
    assert made.like(Centralised()).stages == ()


def test_a_reference_that_pools_data_runs_only_in_simulation(federation: Make) -> None:
    class Remote(InProcess):
        simulated: ClassVar[bool] = False

    with pytest.raises(Incompatible, match=r"Centralised sees all clients' data; it runs only in simulation"):
        federation(Centralised(), link=Remote)


def test_sampled_runs_visit_only_the_sampled(federation: Make, tmp_path: Path) -> None:
    outcome = federation(LocalOnly(), sampler=Uniform(count=1), rounds=1).run(tmp_path / "run")
    [who] = outcome.records[1]["participants"]
    assert [p.name for p in (tmp_path / "run/clients").iterdir()] == [who]


def test_the_places_of_those_who_left_stay_empty(federation: Make, people: People) -> None:
    rest = people.only("ann", "cid")
    left = federation(FedAvg(), members=rest, without=["bob"])
    assert same(left.run().state.weights, federation(FedAvg(), members=rest).run().state.weights)
    assert left.layout.clients == left.setting.population == 3
    two: dict[str, Any] = {"sampler": Uniform(count=2), "rounds": 6}
    before = [federation(FedAvg(), **two).drawn(r) for r in range(1, 7)]
    assert any("bob" in ids for ids in before)
    records = federation(FedAvg(), members=rest, without=["bob"], **two).run().records[1:]
    assert [list(r["participants"]) for r in records] == [[i for i in ids if i != "bob"] for ids in before]
    pooled = federation(Centralised(), members=rest, without=["bob"])
    assert pooled.drawn(1) == ["all"]
    assert federation(FedAvg(), members=rest, without=["bob"]).like(FedAvg()).without == {"bob"}


def test_training_helps(federation: Make) -> None:
    """Ten rounds on clients with one habit each: every client's held-out loss falls by a third."""
    made = federation(FedAvg(), rounds=10, space=Full())
    before = made.assess(made.start())
    after = made.assess(made.run().state)
    assert before is not None
    assert after is not None
    assert all(after.clients[c]["loss"] < 2 / 3 * before.clients[c]["loss"] for c in before.clients)


def test_state_subclasses_need_no_more_code(federation: Make, tmp_path: Path) -> None:
    first = federation(Counting(), rounds=2)
    first.run(tmp_path / "run")
    outcome = federation(Counting(), rounds=5).run(tmp_path / "run", resume=True)
    assert isinstance(outcome.state, CountingState)
    assert outcome.state.rounds_seen == 5
    assert outcome.state.history == (13.0,) * 5


@dataclass(frozen=True)
class CountingState(State):
    """With a number and a growing tuple."""

    rounds_seen: int = 0
    history: tuple[float, ...] = ()


@dataclass(frozen=True)
class Counting(FedIT):
    """Keeps something between rounds."""

    def start(self, space):  # type: ignore[no-untyped-def]
        return CountingState(super().start(space).weights)

    def apply(self, state, combined, rule):  # type: ignore[no-untyped-def]
        after = super().apply(state, combined, rule)
        return replace(after, rounds_seen=state.rounds_seen + 1, history=(*state.history, combined.weight))
