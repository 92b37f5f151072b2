"""Bits that stages send beside uploads, summed unseen: the bound of adaptive clipping."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("flwr")
pytest.importorskip("tenseal")

from fedfm.core.update import Kind, Tensors, Update
from fedfm.errors import BadUpdate
from fedfm.evaluate import Evaluation
from fedfm.federation import Federation
from fedfm.links.flower import InMemoryFlower
from fedfm.methods.lora.fedit import FedIT
from fedfm.observe import Observer
from fedfm.sample import Poisson
from fedfm.secure.ckks import CKKS
from fedfm.secure.fixed_point import FixedPoint, Ring
from fedfm.secure.secagg import SecAgg
from fedfm.secure.secagg_plus import SecAggPlus
from fedfm.secure.secure import Secure
from fedfm.train import Trainer
from fedfm.wire import AdaptiveClip, Gaussian
from fedfm.wire.adaptive_clip import BELOW
from tests.links.outcome import timeless
from tests.secure.links import Wire
from tests.secure.test_secure_runs import Half, Losing, Quantised, crowd, same

Make = Callable[..., Federation]
S = 0.05
STAGES = (AdaptiveClip(S), Gaussian(0.1, delta=1e-3))
MASKS = SecAgg(threshold=0.5, max_value=0.5, max_weight=1)
CODE = FixedPoint(4, 3.5, 9, beside=("bit", "other"))


@pytest.fixture
def federation(federation: Make) -> Make:
    return lambda method, **changes: federation(
        method,
        **{
            "engine": Trainer,
            "evaluation": Evaluation(every=0),
            "stages": STAGES,
            "sampler": Poisson(rate=1.0),
            "rounds": 3,
            **changes,
        },
    )


def update(bit: float, other: float, weight: float = 3.0) -> Update:
    return Update({"w": torch.tensor([1.0, -2.0]), "bit": torch.tensor(bit), "other": torch.tensor(other)}, weight)


def bounds(wire: Wire) -> list[list[float]]:
    """What clients were told of the bound, round by round."""
    told = [(r, float(t["@0:max_norm"])) for phase, r, _, t in wire.sent if phase == "local"]
    return [[bound for r, bound in told if r == round] for round in sorted({r for r, _ in told})]


# The integers.


def test_bits_by_hand() -> None:
    ring = CODE.ring(3)
    # 4 bits, M = 3.5: the step is 0.5. Values times the weight; bits are not; the weight; nothing was clamped.
    one = CODE.encode(update(0.5, -0.5), ring)
    assert ring.signed(one).tolist() == [6, -12, 1, -1, 3, 0]
    total = ring.signed(one + CODE.encode(update(0.5, 0.5, 1.0), ring) + CODE.encode(update(0.5, -0.5, 1.0), ring))
    assert CODE.counted(total, 3) == {"bit": 1.5, "other": -0.5}
    like = {"w": torch.zeros(2)}
    assert CODE.length(like) == len(total) == 6
    mean, clamped = CODE.decode(total, 3, like, Kind.DELTA)
    assert (mean.tensors["w"].tolist(), mean.weight, clamped) == ([1.0, -2.0], 5.0, 0)
    assert mean.tensors.keys() == {"w"}


def test_without_bits_nothing_is_counted() -> None:
    assert FixedPoint(4, 3.5, 9).counted(np.array([1, 2, 3, 0]), 3) == {}


@pytest.mark.parametrize("bit", [0.0, 1.0, 7.0, float("nan"), float("-inf")])
def test_what_is_no_bit_is_not_summed(bit: float) -> None:
    with pytest.raises(BadUpdate, match="the number 'bit' beside its upload is neither a half nor minus a half"):
        CODE.encode(update(bit, 0.5), Ring(4))
    with pytest.raises(BadUpdate, match="the number 'other' beside its upload is neither"):
        CODE.encode(Update({"w": torch.zeros(2), "bit": torch.tensor(0.5)}, 1.0), Ring(4))


@pytest.mark.parametrize("total", [4, -4, 5, 2, 0])
def test_a_sum_of_no_bits_is_noticed(total: int) -> None:
    with pytest.raises(BadUpdate, match="the sum of 'bit' is none of 3 halves: a client sent something else"):
        CODE.counted(np.array([0, 0, total, 1, 3, 0]), 3)
    assert CODE.counted(np.array([0, 0, -3, 1, 3, 0]), 3)["bit"] == -1.5


# Whole runs.


@pytest.mark.parametrize(
    "secure",
    [MASKS, SecAggPlus(neighbours=2, max_value=0.5, max_weight=1), CKKS(max_value=0.5, max_weight=1)],
    ids=lambda part: part.id,
)
def test_a_run_is_that_with_the_bits_in_the_open(federation: Make, secure: Secure) -> None:
    unseen, seen = Wire(), Wire()
    hidden = federation(FedIT(), secure=secure, link=unseen)
    outcome = hidden.run()
    open_ = federation(FedIT(), mean=Quantised(code=FixedPoint(24, 0.5, 1)), link=seen)
    other = open_.run()
    assert same(outcome.state.weights, other.state.weights)
    assert bounds(unseen) == bounds(seen)
    assert [len(set(round)) for round in bounds(unseen)] == [1, 1, 1], "one bound for all in a round"
    assert len({round[0] for round in bounds(unseen)}) == 3, "another one in the next"
    # The account is the same, too.
    assert [r["privacy"] for r in outcome.records[1:]] == [r["privacy"] for r in other.records[1:]]
    assert hidden.spent(3) == open_.spent(3)
    assert outcome.records[3]["privacy"]["clients"]["epsilon"] > 0


def test_nothing_is_seen_in_the_open(federation: Make) -> None:
    wire, plain = Wire(), Wire()
    outcome = federation(FedIT(), secure=MASKS, link=wire).run()
    names = {name for *_, tensors in wire.got for name in tensors}
    assert all(name.startswith("secure:") for name in names)
    uploads = [tensors for phase, _, _, tensors in wire.got if phase == "local"]
    values = sum(t.numel() for t in outcome.state.weights.values())
    # The bit is one coordinate more; weight and clamped are the other two.
    assert all(t.keys() == {"secure:masked"} and len(t["secure:masked"]) == values + 3 for t in uploads)
    federation(FedIT(), link=plain).run()
    assert any(BELOW in tensors for *_, tensors in plain.got), "without secure they are seen"
    for record in outcome.records[1:]:
        # What is clamped would be a count without noise.
        assert record["secure"].keys().isdisjoint({"clamped", BELOW})
        assert all(p.keys() <= {"seconds", "steps", "bytes_up", "memory"} for p in record["participants"].values())
    assert not any("clip" in name or "@" in name for name in outcome.state.weights)


def test_flower_is_bit_equal_to_in_process(federation: Make) -> None:
    here = federation(Half(), secure=MASKS).run()
    there = federation(Half(), secure=MASKS, link=InMemoryFlower).run()
    assert same(here.state.weights, there.state.weights)
    assert timeless(here.records) == timeless(there.records)


def test_a_resumed_run_is_bit_equal(federation: Make, tmp_path: Path) -> None:
    first, then, all_of_it = Wire(), Wire(), Wire()
    whole = federation(Half(), secure=MASKS, link=all_of_it).run()
    half = federation(Half(), secure=MASKS, link=first)

    class Quit(Observer):
        def round_finished(self, record: Mapping[str, Any]) -> None:
            if record["round"] == 2:
                half.stop()

    assert half.run(tmp_path / "run", observers=[Quit()]).status == "stopped"
    resumed = federation(Half(), secure=MASKS, link=then).run(tmp_path / "run", resume=True)
    assert same(whole.state.weights, resumed.state.weights)
    assert bounds(first) + bounds(then) == bounds(all_of_it)


def test_who_drops_out_is_not_counted(federation: Make) -> None:
    people, wire, seen = crowd(5), Wire(), Wire()
    method = Losing(lost=("c1",))
    outcome = federation(method, members=people, secure=MASKS, link=wire).run()
    mean = Quantised(code=FixedPoint(24, 0.5, 1))
    other = federation(method, members=people, mean=mean, link=seen).run()
    assert outcome.records[1]["secure"]["summed"] == 4
    assert same(outcome.state.weights, other.state.weights)
    assert bounds(wire) == bounds(seen)


def test_a_bound_that_all_are_within_falls(federation: Make) -> None:
    """Three halves of three clients: the share is 1, and S goes down by e^(-0.2 * 0.5), but for the noise on the bits
    of standard deviation 0.1 / 3 in the share."""
    wire = Wire()
    federation(FedIT(), stages=(AdaptiveClip(50.0), Gaussian(0.1, delta=1e-3)), secure=MASKS, link=wire, rounds=2).run()
    (first, *_), (second, *_) = bounds(wire)
    assert first == 50.0
    assert second == pytest.approx(50 * np.exp(-0.1), rel=0.2 * 5 * 0.1 / 3)
    assert second < 49


def test_a_client_whose_bit_is_none_drops_out(federation: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    send = AdaptiveClip.send

    def lying(self: AdaptiveClip, update: Update, sender: Any) -> Update:
        sent = send(self, update, sender)
        lie: Tensors = {BELOW: torch.tensor(9.0)} if update.member == "c0" else {}
        return Update({**sent.tensors, **lie}, sent.weight, kind=sent.kind, member=sent.member)

    monkeypatch.setattr(AdaptiveClip, "send", lying)
    record = federation(FedIT(), members=crowd(4), secure=MASKS, rounds=1).run().records[1]
    assert [d["client"] for d in record["dropped"]] == ["c0"]
    assert "is neither a half nor minus a half" in record["dropped"][0]["reason"]
