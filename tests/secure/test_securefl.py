"""Uploads that are judged on shares: the numbers, who is refused, what each party sees."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from fedfm.attack.sign_flip import SignFlip
from fedfm.core.update import Tensors, Update
from fedfm.errors import BadUpdate, Incompatible, RecipeError
from fedfm.evaluate import Evaluation
from fedfm.federation import Federation
from fedfm.methods.lora.fedit import FedIT
from fedfm.observe import Observer
from fedfm.robust.fltrust import FLTrust
from fedfm.sample import Poisson
from fedfm.secure.judge import MODULUS, Judge, bytes_of, dot, drawn, numbers_of
from fedfm.secure.judging import Judging
from fedfm.secure.letters import CHECK, MARK, OPEN, SQUARE, of_numbers
from fedfm.secure.securefl import SecureFL
from fedfm.secure.unit_point import PROJECTIONS, UnitPoint, projected
from fedfm.train import Fused, Trainer
from fedfm.wire import Clip, Gaussian
from tests.conftest import People
from tests.secure.links import Wire
from tests.secure.test_secure_runs import SGD, crowd, same

Make = Callable[..., Federation]
CODE = UnitPoint(21, 1.0, 32768)
LEVELS = 2**20 - 1
PEOPLE = crowd(6)
PUBLIC = [row for id in PEOPLE.ids for row in PEOPLE.rows(id, "train")][:6]


@pytest.fixture
def federation(federation: Make) -> Make:
    """Six clients whose rows are like the server's, so that all are trusted."""

    def make(**changes: Any) -> Federation:
        settings = {
            "engine": Trainer,
            "evaluation": Evaluation(every=0),
            "members": PEOPLE,
            "public": PUBLIC,
            "training": SGD,
            "secure": SecureFL(),
        }
        return federation(changes.pop("method", FedIT()), **{**settings, **changes})

    return make


def far(a: Tensors, b: Tensors) -> float:
    return max(float((a[n] - b[n]).abs().max()) for n in a)


def moved(run: Federation) -> tuple[Tensors, Tensors, list[dict[str, Any]]]:
    """Weights before and after, and the records."""
    outcome = run.run()
    return run.start().weights, outcome.state.weights, outcome.records


# Integers.


def test_a_direction_by_hand() -> None:
    update = Update({"w": torch.tensor([3.0, -4.0])}, weight=7.0)
    vector = CODE.ring(3).signed(CODE.encode(update, CODE.ring(3)))
    assert vector.tolist() == [int(0.6 * LEVELS), -int(0.8 * LEVELS), 1, 0]
    assert CODE.unit(int((vector[:2] ** 2).sum()), 2)
    with pytest.raises(BadUpdate, match="the length 0, and so no direction"):
        CODE.encode(Update({"w": torch.zeros(2)}), CODE.ring(3))


@pytest.mark.parametrize(("square", "fine"), [(LEVELS**2, True), (LEVELS**2 + 1, False), ((LEVELS - 2) ** 2, False)])
def test_the_length_is_one_but_for_rounding(square: int, fine: bool) -> None:
    # Two values are each rounded by less than a level, so the length is short by less than the root of two.
    assert CODE.unit(square, 2) is fine


def test_sums_over_subsets_by_hand() -> None:
    vectors = np.array([[1, 2, 3, 4, 5, 6, 7, 8, 9]], np.uint64)
    found = projected(vectors, bytes(32))[0]
    assert found[-1] == 45
    assert len(found) == PROJECTIONS + 1
    assert (found <= 45).all()
    # About half of the coordinates are in a subset, each by itself.
    single = np.eye(9, dtype=np.uint64)
    assert 0.4 < projected(single, bytes(32))[:, :-1].mean() < 0.6
    assert (projected(single, bytes(32)).sum(0) == projected(np.ones((1, 9), np.uint64), bytes(32))[0]).all()


def test_a_vector_whose_square_wraps_round_is_seen_by_its_sums() -> None:
    values = 1000
    vector = np.zeros(values, np.uint64)
    vector[0] = LEVELS
    assert CODE.short(projected(vector[None], bytes(32))[0].view(np.int64), values)
    vector[1] = 2**32  # Its square is nothing modulo 2^64, and it is 4096 times as long as allowed.
    assert CODE.unit(dot(vector, vector), values)
    assert not CODE.short(projected(vector[None], bytes(32))[0].view(np.int64), values)
    # 17 times as long in many small values.
    long = np.full(values, 17 * LEVELS / math.sqrt(values)).astype(np.uint64)
    signs = np.where(np.arange(values) % 2, long, -long.view(np.int64).astype(np.int64).view(np.uint64))
    assert not CODE.short(projected(signs[None], bytes(32))[0].view(np.int64), values)


@pytest.mark.parametrize(
    ("sum_", "whole", "fine"),
    [
        (3 * LEVELS, 3 * LEVELS, True),  # Nine values of a third each add up to three.
        (3 * LEVELS + 1, 3 * LEVELS, False),
        (0, 3 * LEVELS, True),
        (0, 3 * LEVELS + 1, False),
    ],
)
def test_sums_of_nine_values_are_three_at_most(sum_: int, whole: int, fine: bool) -> None:
    assert CODE.short(np.array([sum_] * PROJECTIONS + [whole]), 9) is fine


@pytest.mark.parametrize(("sum_", "fine"), [(4 * LEVELS, True), (4 * LEVELS + 1, False), (-4 * LEVELS - 1, False)])
def test_sums_with_signs_are_eight_at_most(sum_: int, fine: bool) -> None:
    assert CODE.short(np.array([0] * (PROJECTIONS - 1) + [sum_, 0]), 10_000) is fine


def test_honest_directions_pass() -> None:
    draw = np.random.default_rng(0)
    for values in (1, 2, 100, 10_000):
        for one in (draw.normal(size=(20, values)), np.ones((1, values))):
            for row in one:
                vector = CODE.encode(Update({"w": torch.from_numpy(row)}), CODE.ring(3))[:values]
                assert CODE.unit(dot(vector, vector), values)
                assert CODE.short(projected(vector[None], draw.bytes(32))[0].view(np.int64), values)


def test_numbers_on_their_way() -> None:
    numbers = np.array([[1, 2**64 - 1], [3, 4]], np.uint64)
    assert (numbers_of(bytes_of(numbers)) == numbers).all()


# Runs.


@pytest.mark.parametrize("threat", [None, SignFlip(clients=("c1", "c4"), scale=3.0)], ids=["honest", "turned"])
def test_a_run_is_that_of_fltrust_in_the_open(federation: Make, threat: Any) -> None:
    start, mine, records = moved(federation(threat=threat))
    _, open_, _ = moved(federation(threat=threat, secure=None, screens=(FLTrust(),)))
    assert far(mine, start) > 0.01
    assert far(mine, open_) < 1e-4
    assert [r["secure"]["trusted"] for r in records[1:]] == [6 if threat is None else 4] * 2
    assert all(not r["dropped"] for r in records[1:])


def test_clients_trained_together_are_judged_alike(federation: Make) -> None:
    assert far(moved(federation())[1], moved(federation(engine=Fused))[1]) < 1e-4


class Ending(Observer):
    """Stops a run after its first round."""

    def __init__(self, run: Federation) -> None:
        self.run = run

    def round_finished(self, record: Any) -> None:
        if record["round"] == 1:
            self.run.stop()


def test_a_resumed_run_is_bit_equal(federation: Make, tmp_path: Path) -> None:
    whole = federation(rounds=3).run(tmp_path / "whole")
    half = federation(rounds=3)
    assert half.run(tmp_path / "half", observers=[Ending(half)]).status == "stopped"
    resumed = federation(rounds=3).run(tmp_path / "half", resume=True)
    assert len(resumed.records) == len(whole.records)
    assert same(resumed.state.weights, whole.state.weights)


def test_it_is_the_same_over_flower(federation: Make) -> None:
    pytest.importorskip("flwr")
    from fedfm.links.flower import InMemoryFlower

    assert same(moved(federation())[1], moved(federation(link=InMemoryFlower))[1])


@pytest.mark.parametrize("more", [2**19, 2**32], ids=["longer", "wrapped"])
def test_who_sends_no_direction_is_named_and_left_out(federation: Make, more: int) -> None:
    def longer(phase: str, round: int, client: str, tensors: dict[str, Any]) -> Tensors:
        if client == "c2" and f"{MARK}share" in tensors:
            share = numbers_of(tensors[f"{MARK}share"].numpy()).copy()
            share[5] += np.uint64(more)
            return {f"{MARK}share": torch.from_numpy(bytes_of(share))}
        return tensors

    _, mine, records = moved(federation(link=Wire(forge=longer)))
    assert [(d["client"], d["reason"]) for r in records[1:] for d in r["dropped"]] == [
        ("c2", "its vector does not have the length 1")
    ] * 2
    assert records[1]["secure"]["trusted"] == 5
    others = People({id: PEOPLE.data[id] for id in PEOPLE.ids if id != "c2"})
    assert far(mine, moved(federation(members=others, secure=None, screens=(FLTrust(),)))[1]) < 1e-4


@pytest.mark.parametrize(
    ("task", "says"),
    [
        (SQUARE, "was to deal the squares of the round and is gone"),
        (CHECK, "holds shares of all and is gone"),
        (OPEN, "holds shares of all and is gone"),
    ],
)
def test_without_a_helper_the_round_ends_and_nothing_counts(federation: Make, task: str, says: str) -> None:
    start, mine, records = moved(federation(rounds=1, link=Wire(gone={task: tuple(PEOPLE.ids)})))
    assert says in records[1]["secure"]["ended"]
    assert same(start, mine)


def test_where_nobody_is_trusted_the_model_stays(federation: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Judging, "_trust", lambda self, score: 0)
    start, mine, records = moved(federation())
    assert same(start, mine)
    assert records[1]["secure"]["trusted"] == 0


def test_no_sum_of_two_is_opened(federation: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = iter([1, 1, 0, 0, 0, 0])
    monkeypatch.setattr(Judging, "_trust", lambda self, score: next(weights))
    start, mine, records = moved(federation(rounds=1))
    assert "2 clients are trusted, fewer than the 3 whose sum may be seen" in str(records[1]["secure"]["ended"])
    assert same(start, mine)


def test_others_help_in_each_round(federation: Make) -> None:
    records = moved(federation())[2]
    pairs = [(r["secure"]["holders"], r["secure"]["dealer"]) for r in records[1:]]
    assert pairs == [(["c1"], "c2"), (["c2"], "c3")]


# What each party sees.


def test_what_server_and_holder_are_given_is_uniform(federation: Make) -> None:
    wire = Wire()
    federation(rounds=1, link=wire).run()
    shares = [numbers_of(t[f"{MARK}share"].numpy()) for _, _, _, t in wire.got if f"{MARK}share" in t]
    [asked] = [t for phase, _, _, t in wire.sent if phase == CHECK]
    [answered] = [t for phase, _, _, t in wire.got if phase == CHECK]
    apart = [numbers_of(t[f"{MARK}apart"].numpy()) for t in (asked, answered)]
    for seen in (np.concatenate(shares), *apart, apart[0] + apart[1]):
        assert kstest(seen.flatten() / MODULUS, "uniform").pvalue > 1e-4
    names = {name for phase, _, _, t in wire.got for name in t}
    assert all(name.startswith(MARK) for name in names)


def test_a_helper_asks_no_step_twice_and_opens_what_was_judged_alone() -> None:
    judge = Judge(1, CODE, 0.5)
    judge.keys()
    with pytest.raises(BadUpdate, match="'check' after 'keys'"):
        judge.check({})
    with pytest.raises(BadUpdate, match="'open' after 'keys'"):
        judge.open(of_numbers("weights", [1, 1, 1]))
    judge._judged, judge._held = [0, 1, 2], [bytes([k]) * 32 for k in range(3)]
    judge._turn("check")
    question = of_numbers("length", [4])
    with pytest.raises(BadUpdate, match="not those of the clients who were judged"):
        judge.open(question | of_numbers("weights", [1, 1]))


def test_the_holder_sums_what_it_holds_by_trust() -> None:
    judge = Judge(1, CODE, 0.5)
    judge._judged, judge._held = [0, 1, 2], [bytes([k]) * 32 for k in range(3)]
    judge._turn("check")
    found = judge.open(of_numbers("weights", [5, 1, 2]) | of_numbers("length", [4]))[f"{MARK}sum"].numpy()
    expected = sum(np.uint64(w) * drawn(4, bytes([k]) * 32) for k, w in enumerate((5, 1, 2)))
    assert (numbers_of(found) == expected).all()


# What it does not go with.


def test_what_it_does_not_go_with(federation: Make) -> None:
    with pytest.raises(Incompatible, match="no epsilon of Gaussian counts that"):
        federation(stages=(Clip(0.5), Gaussian(1.0)), sampler=Poisson(rate=1.0))
    with pytest.raises(RecipeError, match="SecureFL judges uploads by rows that the server has, and there are no"):
        federation(public=())
    with pytest.raises(RecipeError, match="max_value must be 1"):
        SecureFL(max_value=2.0)
    with pytest.raises(RecipeError, match="bits must be at most 21"):
        SecureFL(bits=24)
