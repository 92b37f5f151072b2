"""The adaptive server rules and momentum."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedfm import parts
from fedfm.core.method import Method, State
from fedfm.core.update import Update
from fedfm.errors import RecipeError
from fedfm.rules import Adagrad, Adam, Add, Momentum, Yogi

ADAPTIVE: list[type] = [Adagrad, Adam, Yogi]
CHANGES = [[0.5, -0.02, 0.0], [-0.1, 0.03, 0.7], [0.001, 0.04, -0.2]]


def run(rule: Any, changes: list[list[float]], dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, list[Any]]:
    """Weights after all changes, from zero, and the memory after each."""
    weights: Any = {"w": torch.zeros(len(changes[0]), dtype=dtype)}
    memory: Any = {}
    memories = []
    for change in changes:
        weights, memory = rule(weights, {"w": torch.tensor(change, dtype=dtype)}, memory)
        memories.append(memory)
    return weights["w"], memories


def by_pen(second: Callable[[float, float], float], eta: float, beta: float, tau: float) -> list[float]:
    """The weights after ``CHANGES``, one coordinate after another, in plain Python."""
    result = []
    for series in zip(*CHANGES, strict=True):
        w, m, v = 0.0, 0.0, tau**2
        for d in series:
            m = beta * m + (1 - beta) * d
            v = second(v, d)
            w += eta * m / (math.sqrt(v) + tau)
        result.append(w)
    return result


@pytest.mark.parametrize(
    ("rule", "beta", "second"),
    [
        (Adagrad(0.3, tau=0.01), 0.0, lambda v, d: v + d * d),
        (Adagrad(0.3, beta1=0.5, tau=0.01), 0.5, lambda v, d: v + d * d),
        (Adam(0.3, 0.8, 0.01, 0.95), 0.8, lambda v, d: 0.95 * v + 0.05 * d * d),
        (Yogi(0.3, 0.8, 0.01, 0.95), 0.8, lambda v, d: v - 0.05 * d * d * ((v > d * d) - (v < d * d))),
    ],
    ids=["adagrad", "adagrad-beta", "adam", "yogi"],
)
def test_three_rounds_match_the_formula_written_out(rule: Any, beta: float, second: Any) -> None:
    weights, _ = run(rule, CHANGES)
    assert weights.tolist() == pytest.approx(by_pen(second, 0.3, beta, 0.01), abs=1e-12)


def test_the_first_step_by_hand_without_correction_of_bias() -> None:
    # m = 0.1 * 1 = 0.1; v = 0.99 * 0.25 + 0.01 * 1 = 0.2575; w = 1 * 0.1 / (sqrt(0.2575) + 0.5).
    weights, [memory] = run(Adam(1.0, 0.9, 0.5, 0.99), [[1.0]])
    assert memory["m"]["w"].item() == pytest.approx(0.1)
    assert memory["v"]["w"].item() == pytest.approx(0.2575)
    assert weights.item() == pytest.approx(0.1 / (math.sqrt(0.2575) + 0.5))


@pytest.mark.parametrize("rule", ADAPTIVE)
def test_the_defaults_are_the_papers(rule: type) -> None:
    one = rule()
    assert (one.learning_rate, one.tau) == (0.1, 1e-3)
    assert one.beta1 == (0.0 if rule is Adagrad else 0.9)
    assert getattr(one, "beta2", 0.99) == 0.99


def test_v_of_adagrad_never_falls_but_that_of_adam_does() -> None:
    changes = torch.randn(30, 20, generator=torch.Generator().manual_seed(0)) * torch.linspace(3, 0.01, 30)[:, None]

    def falls(rule: Any) -> bool:
        squares = [memory["v"]["w"] for memory in run(rule, changes.tolist())[1]]
        return any(bool((after < before).any()) for before, after in itertools.pairwise(squares))

    assert not falls(Adagrad())
    assert falls(Adam())


def test_where_yogi_and_adam_take_the_same_step_of_v() -> None:
    # The same for v of 0, D^2 and 2 D^2. At v = 10 D^2 with D = 1: Adam 9.9 + 0.01 = 9.91, Yogi 10 - 0.01 = 9.99.
    v, square = torch.tensor([0.0, 1.0, 2.0, 10.0]), torch.ones(4)
    adam, yogi = Adam().second(v, square), Yogi().second(v, square)
    torch.testing.assert_close(adam[:3], yogi[:3])
    assert adam[3].item() == pytest.approx(9.91)
    assert yogi[3].item() == pytest.approx(9.99)


def test_v_of_yogi_stays_at_least_zero_and_changes_by_little() -> None:
    rule, v = Yogi(), torch.full((200,), 1e-6, dtype=torch.float64)
    for i in range(50):
        square = torch.randn(200, generator=torch.Generator().manual_seed(i), dtype=torch.float64).square()
        after = rule.second(v, square)
        assert (after >= 0).all()
        assert ((after - v).abs() <= 0.01 * square + 1e-15).all()
        v = after


@pytest.mark.parametrize("rule", ADAPTIVE)
def test_with_v_held_at_one_it_is_plain_addition(rule: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule, "second", lambda self, v, square: torch.ones_like(v))
    weights, _ = run(rule(learning_rate=1.0, beta1=0.0, tau=1e-300), CHANGES)
    assert weights.tolist() == pytest.approx(run(Add(), CHANGES)[0].tolist(), abs=1e-15)


def test_momentum_by_hand() -> None:
    # beta 0.5, eta 2, D = 1, 3: m = 1, 3.5; w = 2, 9. With Nesterov w = 2 * (1 + 0.5) = 3, then 3 + 2 * (3 + 1.75).
    weights, memories = run(Momentum(2.0, 0.5), [[1.0], [3.0]])
    assert weights.tolist() == [9.0]
    assert [memory["m"]["w"].item() for memory in memories] == [1.0, 3.5]
    weights, memories = run(Momentum(2.0, 0.5, nesterov=True), [[1.0], [3.0]])
    assert weights.tolist() == [12.5]
    assert [memory["m"]["w"].item() for memory in memories] == [1.0, 3.5]


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_of_zero_is_plain_addition_bit_for_bit(nesterov: bool) -> None:
    changes = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)).tolist()
    momentum = run(Momentum(beta=0.0, nesterov=nesterov), changes, torch.float32)[0]
    assert torch.equal(momentum, run(Add(), changes, torch.float32)[0])


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_constant_change_moves_by_its_sum_in_the_end(nesterov: bool) -> None:
    # D / (1 - beta) = 0.2 / 0.1 = 2 a round.
    before = run(Momentum(nesterov=nesterov), [[0.2]] * 299)[0]
    after = run(Momentum(nesterov=nesterov), [[0.2]] * 300)[0]
    assert (after - before).item() == pytest.approx(2.0, abs=1e-9)


@pytest.mark.parametrize("rule", [Adagrad(), Adam(), Yogi(), Momentum(), Momentum(nesterov=True)], ids=repr)
def test_nothing_is_changed_in_place_and_all_else_stays(rule: Any) -> None:
    weights = {"w": torch.ones(2), "still": torch.tensor(5.0)}
    delta = {"w": torch.tensor([0.5, -0.5])}
    first, memory = rule(weights, delta, {"other": 1})
    kept = {slot: memory[slot]["w"].clone() for slot in memory.keys() & {"m", "v"}}
    second, later = rule(first, {"w": torch.tensor([0.1, 0.1])}, memory)
    assert weights["w"].tolist() == [1.0, 1.0]
    assert delta["w"].tolist() == [0.5, -0.5]
    assert all(torch.equal(memory[slot]["w"], kept[slot]) for slot in kept)
    assert not torch.equal(later["m"]["w"], memory["m"]["w"])
    assert second["still"].item() == 5.0
    assert (memory["other"], later["other"]) == (1, 1)
    # A round in which another tensor travels leaves the moments of this one as they are.
    _, last = rule(second, {"still": torch.tensor(1.0)}, later)
    assert torch.equal(last["m"]["w"], later["m"]["w"])
    assert "still" in last["m"]


@pytest.mark.parametrize("rule", [Adagrad(), Adam(), Yogi(), Momentum()], ids=repr)
def test_the_memory_shares_no_storage_with_the_change_and_is_wide(rule: Any) -> None:
    delta = torch.full((3,), 0.5, dtype=torch.bfloat16)
    weights, memory = rule({"w": torch.zeros(3, dtype=torch.bfloat16)}, {"w": delta}, {})
    assert weights["w"].dtype == torch.bfloat16
    assert memory["m"]["w"].dtype == torch.float32
    change = torch.full((3,), 0.5)
    _, memory = rule({"w": torch.zeros(3)}, {"w": change}, {})
    before = memory["m"]["w"].clone()
    change.fill_(9.0)
    assert torch.equal(memory["m"]["w"], before)


@pytest.mark.parametrize("rule", [Adagrad(), Adam(), Yogi(), Momentum()], ids=repr)
def test_a_run_that_goes_on_from_memory_is_equal_bit_for_bit(rule: Any) -> None:
    changes = torch.randn(4, 10, generator=torch.Generator().manual_seed(2)).tolist()
    state: Any = State({"w": torch.zeros(10)})
    for i, change in enumerate(changes):
        if i == 2:  # through what a checkpoint holds
            saved = {slot: {n: t.clone() for n, t in tree.items()} for slot, tree in state.memory.items()}
            state = State({n: t.clone() for n, t in state.weights.items()}, saved)
        state = Method().apply(state, Update({"w": torch.tensor(change)}), rule)
    assert torch.equal(state.weights["w"], run(rule, changes, torch.float32)[0])


@pytest.mark.parametrize("kind", ["adagrad", "adam", "yogi", "momentum"])
def test_a_recipe_names_it(kind: str) -> None:
    rule = parts.make("rules", {"kind": kind, "learning_rate": 0.5}, "rule")
    assert rule.id == kind
    assert rule.learning_rate == 0.5
    assert getattr(rule, "paper", None) is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Adam(0.0), "rule.learning_rate must be above 0 and finite, but is 0.0."),
        (lambda: Yogi(float("nan")), "rule.learning_rate must be above 0 and finite, but is nan."),
        (lambda: Adagrad(tau=0.0), "rule.tau must be above 0 and finite, but is 0.0."),
        (lambda: Adam(beta1=1.0), "rule.beta1 must be at least 0 and below 1, but is 1.0."),
        (lambda: Adam(beta2=-0.1), "rule.beta2 must be at least 0 and below 1, but is -0.1."),
        (lambda: Yogi(beta2=1.0), "rule.beta2 must be at least 0 and below 1, but is 1.0."),
        (lambda: Momentum(beta=1.0), "rule.beta must be at least 0 and below 1, but is 1.0."),
        (lambda: Momentum(float("inf")), "rule.learning_rate must be above 0 and finite, but is inf."),
    ],
)
def test_a_useless_setting_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make()
    assert str(caught.value) == message
