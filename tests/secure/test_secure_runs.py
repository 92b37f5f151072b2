"""Whole runs whose uploads are summed unseen: the numbers, the dropped, what the server gets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from fedfm.core import trees
from fedfm.core.mean import WeightedMean
from fedfm.core.method import Client, Method, Work
from fedfm.core.plan import Training
from fedfm.core.traits import Trait, Traits
from fedfm.core.update import Kind, Member, Tensors, Update
from fedfm.errors import BadUpdate, DataError, FedfmError, Incompatible, RecipeError
from fedfm.evaluate import Evaluation
from fedfm.federation import Federation
from fedfm.links.inprocess import InProcess
from fedfm.links.link import Reply
from fedfm.methods.fedavg import FedAvg
from fedfm.methods.lora.fedit import FedIT
from fedfm.methods.optim.scaffold import Scaffold
from fedfm.observe import Observer
from fedfm.robust.krum import Krum
from fedfm.robust.median import Median
from fedfm.sample import Poisson, Uniform
from fedfm.schedule.buffered import Buffered
from fedfm.secure.fixed_point import FixedPoint
from fedfm.secure.secagg import SecAgg
from fedfm.secure.secagg_plus import SecAggPlus
from fedfm.secure.secure import Secure
from fedfm.store.clients import ClientStore
from fedfm.train import Fused, Trainer
from fedfm.wire import QSGD, Clip, Gaussian, TopK
from fedfm.wire.admit import Limits
from tests.conftest import People, dialogue

Make = Callable[..., Federation]
HALF = SecAgg(threshold=0.5)


def same(a: Tensors, b: Tensors) -> bool:
    return list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)


def crowd(clients: int) -> People:
    """Clients with 2, 3, 4 and again 2, ... rows."""

    def rows(habit: str, n: int) -> list[dict[str, Any]]:
        return [dialogue(f"{habit} {i}?", f"{habit * (1 + i % 3)}!") for i in range(n)]

    some = {f"c{k}": {"train": rows(chr(97 + k), 2 + k % 3), "validation": [], "test": []} for k in range(clients)}
    return People(some)


@pytest.fixture
def federation(federation: Make) -> Make:
    return lambda method, **changes: federation(
        method, **{"engine": Trainer, "evaluation": Evaluation(every=0), **changes}
    )


@dataclass(frozen=True)
class Quantised(WeightedMean):
    """The mean of what the clients would send, quantised and summed in the open."""

    code: FixedPoint = field(default_factory=lambda: FixedPoint(24, 1.0, 65536))

    def __call__(self, updates: Any) -> Update:
        got = list(updates)
        ring = self.code.ring(len(got))
        total = sum(ring.signed(self.code.encode(update, ring)) for update in got)
        return self.code.decode(total, len(got), got[0].tensors, got[0].kind)[0]


@dataclass(frozen=True)
class Half(FedIT):
    """A stays with the client, B travels."""

    share: ClassVar[trees.Patterns] = ("lora_B",)
    traits: ClassVar[Traits] = FedIT.traits - {Trait.FORGETFUL}


class Transcript(InProcess):
    """The in-process link, keeping all that the server gets."""

    got: ClassVar[list[tuple[str, int, Update]]] = []

    def ask(self, phase: str, round: int, messages: Mapping[Member, Tensors]) -> Iterator[Reply]:
        for reply in super().ask(phase, round, messages):
            if reply.update is not None:
                self.got.append((phase, round, reply.update))
            yield reply


# The numbers.


SGD = Training(max_steps=2, per_device_train_batch_size=2, learning_rate=0.1, optim="sgd", max_grad_norm=0.0)


@pytest.mark.parametrize(
    ("method", "secure"),
    [
        (FedIT(), SecAgg()),
        (FedAvg(weighting="clients"), HALF),
        (Half(), SecAggPlus()),
        (Scaffold(), SecAggPlus(neighbours=2)),
    ],
    ids=lambda part: part.id,
)
def test_a_run_is_that_with_the_open_sum_of_the_same_integers(federation: Make, method: Method, secure: Secure) -> None:
    unseen = federation(method, secure=secure, training=SGD).run()
    seen = federation(method, mean=Quantised(), training=SGD).run()
    assert same(unseen.state.weights, seen.state.weights)
    plain = federation(method, training=SGD).run().state.weights
    for name, tensor in plain.items():
        torch.testing.assert_close(unseen.state.weights[name], tensor, rtol=0, atol=1e-6)
    assert any(not torch.equal(t, plain[n]) for n, t in unseen.state.weights.items())


def test_clients_trained_together_are_summed_alike(federation: Make) -> None:
    together = federation(FedIT(), secure=HALF, engine=Fused).run().state.weights
    assert same(together, federation(FedIT(), mean=Quantised(), engine=Fused).run().state.weights)


def test_a_resumed_run_is_bit_equal(federation: Make, tmp_path: Path) -> None:
    whole = federation(Half(), secure=HALF, rounds=3).run(tmp_path / "whole")
    half = federation(Half(), secure=HALF, rounds=3)

    class Quit(Observer):
        def round_finished(self, record: Mapping[str, Any]) -> None:
            if record["round"] == 2:
                half.stop()

    assert half.run(tmp_path / "half", observers=[Quit()]).status == "stopped"
    resumed = federation(Half(), secure=HALF, rounds=3).run(tmp_path / "half", resume=True)
    assert same(whole.state.weights, resumed.state.weights)
    other = federation(Half(), secure=SecAgg(bits=20, threshold=0.5), rounds=3)
    with pytest.raises(
        RecipeError, match=r"cannot resume: secure was SecAgg\(.*bits=24.* and is now SecAgg\(.*bits=20"
    ):
        other.run(tmp_path / "half", resume=True)


def test_private_state_is_kept_when_the_sum_was_admitted(federation: Make, tmp_path: Path) -> None:
    federation(Half(), secure=HALF).run(tmp_path / "unseen")
    federation(Half(), mean=Quantised()).run(tmp_path / "seen")
    kept = {
        place: {
            p.relative_to(tmp_path / place): p.read_bytes() for p in (tmp_path / place).rglob("clients/*/*.safetensors")
        }
        for place in ("unseen", "seen")
    }
    assert kept["unseen"] == kept["seen"]
    assert len(kept["seen"]) == 6
    # A round that ends before the sum is seen leaves no trace: nobody reveals shares.
    made = federation(Half(), secure=Deaf(threshold=0.5), rounds=1)
    record = made.run(tmp_path / "deaf").records[1]
    assert record["secure"]["ended"].startswith("0 shares of the secrets of 'ann' were revealed")
    assert list((tmp_path / "deaf").rglob("clients/*/*.safetensors")) == []
    assert same(made.start().weights, made.run().state.weights)


class Deaf(SecAgg):
    """Nobody answers the last question."""

    def parties(self, stages: Any = ()) -> Any:
        found = super().parties(stages)
        answer = found.answer

        def deaf(phase: str, *rest: Any) -> Update:
            if phase == "secure/unmask":
                raise BadUpdate("deaf")
            return answer(phase, *rest)

        found.answer = deaf
        return found


# Who drops out.


@dataclass(frozen=True)
class Losing(FedIT):
    """Some clients cannot train."""

    lost: tuple[str, ...] = ()

    def local(self, client: Client, message: Tensors) -> Work:
        if client.member.id in self.lost:
            raise DataError("no rows")
        return (yield from super().local(client, message))


@pytest.mark.parametrize("secure", [SecAgg(), SecAggPlus(neighbours=6)], ids=lambda s: s.id)
def test_a_run_with_drop_outs_equals_the_run_without_them(federation: Make, secure: Secure) -> None:
    people = crowd(8)
    lost = ("c0", "c5")
    outcome = federation(Losing(lost=lost), members=people, secure=secure, rounds=2).run()
    without = federation(FedIT(), members=people.only(*(i for i in people.ids if i not in lost)), mean=Quantised())
    assert same(outcome.state.weights, without.run().state.weights)
    record = outcome.records[1]
    assert [(d["client"], d["reason"]) for d in record["dropped"]] == [("c0", "no rows"), ("c5", "no rows")]
    assert sorted(record["participants"]) == ["c1", "c2", "c3", "c4", "c6", "c7"]
    assert (record["secure"]["asked"], record["secure"]["summed"]) == (8, 6)


def test_below_the_threshold_the_round_does_not_count(federation: Make) -> None:
    made = federation(Losing(lost=("ann", "bob")), secure=HALF, rounds=2)
    outcome = made.run()
    assert same(outcome.state.weights, made.start().weights)
    record = outcome.records[1]
    assert record["secure"]["ended"] == (
        "1 of 3 clients sent a masked vector, and of 'cid' and its neighbours 1 are left, fewer than the threshold 2"
    )
    assert record["participants"].keys() == {"cid"}
    with pytest.raises(
        FedfmError, match="too few updates could be used in 3 rounds in a row; in round 3, 'ann': no rows"
    ):
        federation(Losing(lost=("ann", "bob")), secure=HALF, rounds=3).run()
    with pytest.raises(FedfmError, match="too few updates could be used in 3 rounds in a row"):
        federation(
            FedIT(), secure=HALF, limits=Limits(min_clients=4), members=crowd(4), rounds=3, sampler=Tired()
        ).run()


class Tired(Uniform):
    """Draws two of four."""

    def sample(self, ids: Any, round: int, seed: int) -> list[str]:
        return list(ids)[:2]

    def expected(self, population: int) -> float:
        return 3.0


def test_fewer_than_three_who_were_drawn_are_not_summed(federation: Make) -> None:
    made = federation(FedIT(), secure=HALF, members=crowd(4), rounds=1, sampler=Tired())
    outcome = made.run()
    assert outcome.records[1]["secure"]["ended"] == "2 clients were asked, but secure aggregation needs at least 3"
    assert same(outcome.state.weights, made.start().weights)
    limited = federation(Losing(lost=("c0",)), secure=HALF, members=crowd(4), rounds=1, limits=Limits(min_clients=4))
    assert limited.run().records[1]["secure"]["ended"] == "3 of 4 updates could be used, but a round needs 4"


def test_what_cannot_be_encoded_drops_the_client_and_says_why(federation: Make) -> None:
    @dataclass(frozen=True)
    class Odd(FedIT):
        def local(self, client: Client, message: Tensors) -> Work:
            update = yield from super().local(client, message)
            weight = {"c1": 0.5, "c2": 9.0}.get(client.member.id, 1.0)
            tensors = {n: t * float("nan") for n, t in update.tensors.items()}
            return Update(tensors if client.member.id == "c3" else update.tensors, weight)

    made = federation(Odd(), secure=SecAgg(threshold=0.5, max_weight=8), members=crowd(8), rounds=1)
    record = made.run().records[1]
    reasons = {d["client"]: d["reason"] for d in record["dropped"]}
    assert reasons.keys() == {"c1", "c2", "c3"}
    assert reasons["c1"].startswith("its weight 0.5 is no whole number from 1 to the 8 of max_weight: raise that, or")
    assert reasons["c2"].startswith("its weight 9 is no whole number")
    assert "is not finite" in reasons["c3"]


def test_lies_of_clients_drop_them_by_name(federation: Make) -> None:
    class Lying(InProcess):
        def ask(self, phase: str, round: int, messages: Mapping[Member, Tensors]) -> Iterator[Reply]:
            for reply in super().ask(phase, round, messages):
                who, update = reply.member.id, reply.update
                assert update is not None
                name = next(iter(update.tensors))
                wrong = {
                    ("secure/keys", "c0"): {name: torch.zeros(2, 32)},
                    ("secure/shares", "c1"): {},
                    ("local", "c2"): {name: update.tensors[name][:-1]},
                    ("secure/unmask", "c3"): {name: update.tensors[name] + 1},
                }.get((phase, who))
                if wrong is not None:
                    reply = Reply(reply.member, Update(wrong, 0.0, kind=Kind.KNOWLEDGE, member=who))
                if (phase, who) == ("local", "c4"):
                    reply = Reply(reply.member, Update(wrong or {}, 1.0, kind=Kind.DELTA, member=who))
                yield reply

    people = crowd(12)
    record = federation(FedIT(), secure=HALF, members=people, rounds=1, link=Lying).run().records[1]
    reasons = {d["client"]: d["reason"] for d in record["dropped"]}
    assert list(reasons) == ["c0", "c1", "c2", "c4", "c3"]
    assert reasons["c0"] == "'keys' must be bytes [2, 32], but is torch.float32 [2, 32]"
    assert reasons["c1"].startswith("'sealed' must be bytes [10, 94], but is nothing")
    assert reasons["c2"].startswith("'masked' must be bytes")
    assert reasons["c4"] == "it holds delta, not knowledge"
    assert reasons["c3"].endswith("says of no share whether it is there; its upload is in the sum")
    assert record["secure"]["summed"] == 8
    assert "c3" in record["participants"]
    assert "c2" not in record["participants"]


def test_garbage_in_the_place_of_a_masked_vector_is_noticed_in_the_sum(federation: Make) -> None:
    class Garbage(InProcess):
        def ask(self, phase: str, round: int, messages: Mapping[Member, Tensors]) -> Iterator[Reply]:
            for reply in super().ask(phase, round, messages):
                if phase == "local" and reply.member.id == "ann" and reply.update:
                    reply.update.tensors["secure:masked"].random_(0, 256)  # type: ignore[index]
                yield reply

    made = federation(FedIT(), secure=HALF, rounds=1, link=Garbage)
    outcome = made.run()
    assert outcome.records[1]["secure"]["ended"].startswith("the sum is none of what clients send")
    assert same(outcome.state.weights, made.start().weights)


# What the server gets.


def test_nothing_but_masked_vectors_reaches_the_server(federation: Make) -> None:
    Transcript.got.clear()
    outcome = federation(FedIT(), secure=HALF, link=Transcript).run()
    sent = {(phase, round, u.member): u for phase, round, u in Transcript.got}
    assert {phase for phase, _, _ in sent} == {"secure/keys", "secure/shares", "local", "secure/unmask"}
    assert all(u.weight == 0 and not u.metrics and u.kind is Kind.KNOWLEDGE for u in sent.values())
    assert all(t.dtype == torch.uint8 for u in sent.values() for t in u.tensors.values())
    for name in ("ann", "bob", "cid"):
        rows = [sent["local", r, name].tensors["secure:masked"].numpy() for r in (1, 2)]
        assert rows[0].shape == (sum(t.numel() for t in outcome.state.weights.values()) + 2, 6)
        for row in (*rows, rows[0] - rows[1]):
            assert chisquare(np.bincount(row.reshape(-1), minlength=256)).pvalue > 1e-6
    for record in outcome.records[1:]:
        assert record["train_loss"] is None
        assert all(p.keys() <= {"seconds", "steps", "bytes_up", "memory"} for p in record["participants"].values())
        assert (
            record["secure"].items()
            >= {"kind": "secagg", "asked": 3, "summed": 3, "threshold": 2, "neighbours": 2}.items()
        )
        assert record["secure"]["bytes_per_value"] == 6
        assert record["bytes_up"] == sum(p["bytes_up"] for p in record["participants"].values()) > 0


def test_a_client_never_sends_an_upload_as_it_is(federation: Make) -> None:
    made = federation(FedIT(), secure=HALF)
    link = InProcess(made.method, made.trainer, ClientStore(), **made.shared)
    asked = {made.plan.members.member("ann"): made.start().weights}

    def refused(round: int) -> str:
        [reply] = link.ask("local", round, asked)
        assert reply.update is None
        return reply.reason

    why = "it has no keys for secure aggregation in round {}: it was not asked for any, or was restarted"
    assert refused(1) == why.format(1)
    assert [r.update is None for r in link.ask("secure/keys", 1, {member: {} for member in asked})] == [False]
    assert refused(2) == why.format(2)
    assert refused(1) == (
        "it was asked for 'present' when 'shares' was due: each step of secure aggregation is done once, in order"
    )


def test_clamped_values_are_counted_and_nothing_else_of_them_is_seen(federation: Make) -> None:
    wide = federation(FedIT(), secure=SecAgg(threshold=0.5, max_value=10.0), rounds=1).run().records[1]
    tight = federation(FedIT(), secure=SecAgg(threshold=0.5, max_value=1e-3), rounds=1).run()
    assert wide["secure"]["clamped"] == 0.0
    assert 0.1 < tight.records[1]["secure"]["clamped"] < 1.0
    start = federation(FedIT()).start().weights
    assert max(float((t - start[n]).abs().max()) for n, t in tight.state.weights.items()) <= 1e-3 * (1 + 1e-4)


# What it goes with.


def test_clip_and_central_noise_compose(federation: Make) -> None:
    stages = (Clip(0.05), Gaussian(0.5))
    secure = SecAgg(threshold=0.5, max_value=0.05, max_weight=1)
    everyone = Poisson(rate=1.0)
    unseen = federation(FedIT(), stages=stages, secure=secure, sampler=everyone).run()
    code = Quantised(code=FixedPoint(24, 0.05, 1))
    seen = federation(FedIT(), stages=stages, mean=code, sampler=everyone)
    assert same(unseen.state.weights, seen.run().state.weights)
    assert unseen.records[1]["secure"]["bytes_per_value"] == 4
    assert unseen.records[2]["privacy"] == {"clients": seen.spent(2)["clients"]}
    # A count without noise would say something that no epsilon counts.
    assert "clamped" not in unseen.records[1]["secure"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"screens": (Krum(hostile=0),)}, r"Krum needs VISIBLE \(.*\), which SecAgg takes away\. Bound uploads"),
        ({"mean": Median()}, r"Median needs VISIBLE \(.*\), which SecAgg takes away"),
        ({"schedule": Buffered(buffer=2)}, r"Buffered needs VISIBLE \(.*\), which SecAgg takes away"),
        ({"stages": (TopK(fraction=0.5),)}, r"SecAgg needs DENSE \(.*\), which TopK takes away\. All coordinates"),
        ({"stages": (QSGD(),)}, "SecAgg sums numbers, but QSGD packs them into another form. Leave it out"),
        (
            {"sampler": Uniform(count=2)},
            "SecAgg needs at least 3 clients in a round, but the sampler draws 2 of 3 on average",
        ),
    ],
    ids=["screen", "estimator", "buffered", "topk", "qsgd", "two"],
)
def test_what_it_does_not_go_with(federation: Make, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        federation(FedIT(), secure=SecAgg(), **changes)


@pytest.mark.parametrize("trait", [Trait.LINEAR, Trait.ALIGNED, Trait.DENSE, Trait.ONE_ASK])
def test_what_it_needs_of_a_method(federation: Make, trait: Trait) -> None:
    class Lacks(FedIT):
        traits = FedIT.traits - {trait}

    with pytest.raises(
        Incompatible, match=rf"SecAgg needs {trait.name} \(.*\), which Lacks does not promise\. .*secure"
    ):
        federation(Lacks(), secure=SecAgg())


def test_methods_whose_uploads_are_no_sums(federation: Make) -> None:
    class Says(FedIT):
        sends = Kind.KNOWLEDGE

    class Reads(FedIT):
        def read(self, phase: str, update: Update, message: Tensors) -> Update:
            return update

    class Silent(FedIT):
        def expects(self, phase: str, message: Tensors) -> None:
            return None

    with pytest.raises(Incompatible, match="SecAgg sums changes of weights or weights, but Says sends knowledge"):
        federation(Says(), secure=SecAgg())
    with pytest.raises(Incompatible, match="SecAgg hides single uploads, but Reads reads each of them"):
        federation(Reads(), secure=SecAgg())
    with pytest.raises(FedfmError, match="SecAgg must know which tensors clients upload, and Silent does not say so"):
        federation(Silent(), secure=SecAgg()).run()


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        (SecAgg, {"threshold": 0.4}, "SecAgg threshold must be at least 0.5 and below 1, but is 0.4"),
        (SecAgg, {"threshold": 1.0}, "SecAgg threshold must be at least 0.5 and below 1, but is 1.0"),
        (SecAgg, {"bits": 1}, "SecAgg bits must be from 2 to 32, but is 1"),
        (SecAgg, {"bits": 33}, "SecAgg bits must be from 2 to 32, but is 33"),
        (SecAgg, {"max_value": 0.0}, "SecAgg max_value must be above 0 and finite"),
        (SecAgg, {"max_weight": 0}, "SecAgg max_weight must be at least 1, but is 0"),
        (
            SecAgg,
            {"bits": 32, "max_weight": 2**40},
            r"a sum over 3 clients .* takes 10 bytes, more than 8, .* Lower bits or",
        ),
        (SecAggPlus, {"neighbours": 1}, "SecAggPlus neighbours must be at least 2, or 0, but is 1"),
        (SecAggPlus, {"corrupt": 0.5}, "SecAggPlus corrupt must be at least 0 and below threshold 0.5, but is 0.5"),
        (
            SecAggPlus,
            {"dropout": 0.5},
            "SecAggPlus dropout must be at least 0 and below 1 - threshold, 0.5, but is 0.5",
        ),
        (SecAggPlus, {"security": 0}, "SecAggPlus security must be at least 1, but is 0"),
    ],
)
def test_settings_that_are_refused(kind: type[Secure], settings: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        kind(**settings)


def test_a_sum_that_could_overflow_is_refused_when_built(federation: Make) -> None:
    # 3 clients fit into 64 bits, 300 do not: 2 * 300 * 2^31 * 2^24 is above 2^64.
    tight = SecAgg(bits=32, max_weight=2**24)
    federation(FedIT(), secure=tight)
    with pytest.raises(
        RecipeError, match="a sum over 300 clients of values of 32 bits with weights up to 16777216 takes 9"
    ):
        federation(FedIT(), secure=tight, members=crowd(300))


def test_thresholds_are_whole_numbers_above_the_part() -> None:
    assert [SecAgg().needed(n) for n in (3, 4, 6, 9, 10, 100)] == [3, 3, 5, 7, 7, 67]
    assert all(SecAgg().needed(n) == 2 * n // 3 + 1 for n in range(3, 3000))
    assert [HALF.needed(n) for n in (3, 4, 5, 10)] == [2, 3, 3, 6]


def test_the_record_is_json(federation: Make, tmp_path: Path) -> None:
    federation(FedIT(), secure=HALF, rounds=1).run(tmp_path / "run")
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[1])["secure"]["summed"] == 3
