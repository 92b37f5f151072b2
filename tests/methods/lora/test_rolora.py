"""RoLoRA: B and A take turns, so that averaging is exact in every round and both are learnt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedfm.core import trees
from fedfm.core.client import View
from fedfm.core.jobs import Fit
from fedfm.core.mean import WeightedMean
from fedfm.core.method import State
from fedfm.core.space import Layout
from fedfm.core.update import Member, Tensors, Update
from fedfm.errors import RecipeError
from fedfm.federation import Federation
from fedfm.methods.lora import product
from fedfm.methods.lora.fedit import FedIT
from fedfm.methods.lora.rolora import RoLoRA, Turns
from fedfm.rules import Add, Momentum
from fedfm.spaces import LoRA

Make = Callable[..., Federation]
A, B, HEAD = "x.lora_A.weight", "x.lora_B.weight", "classifier.weight"
LAYOUT = Layout({A: torch.tensor([[1.0, 2.0]]), B: torch.zeros(2, 1)})
ANN = Member("ann", 1)


def asked(method: RoLoRA, state: State) -> list[str]:
    """Names of what a client is to send."""
    return list(method.expects("local", method.message(state, ANN)) or ())


def after(method: RoLoRA, state: State, *sent: tuple[float, Tensors], rule: Any = None) -> State:
    """The state after a round with these uploads and their weights."""
    updates = [Update(tensors, weight) for weight, tensors in sent]
    return method.apply(state, method.combine(state, updates, WeightedMean()), rule or Add())


def test_two_rounds_by_hand() -> None:
    # A = [1 2], B = 0. Round 1: clients of weight 1 and 3 move B by [4, 0] and [0, 8]; the mean is [1, 6].
    method = RoLoRA()
    state = method.start(LAYOUT)
    assert asked(method, state) == [B]
    state = after(method, state, (1, {B: torch.tensor([[4.0], [0.0]])}), (3, {B: torch.tensor([[0.0], [8.0]])}))
    assert (state.weights[B] @ state.weights[A]).tolist() == [[1.0, 2.0], [6.0, 12.0]]
    # Round 2: they move A by [4, 0] and [0, 4] to [5, 2] and [1, 6]; the mean is [2, 5], and the product
    # [2 5; 12 30] is 1/4 [5 2; 30 12] + 3/4 [1 6; 6 36].
    assert asked(method, state) == [A]
    state = after(method, state, (1, {A: torch.tensor([[4.0, 0.0]])}), (3, {A: torch.tensor([[0.0, 4.0]])}))
    assert (state.weights[B] @ state.weights[A]).tolist() == [[2.0, 5.0], [12.0, 30.0]]
    assert asked(method, state) == [B]


def test_the_product_is_the_mean_of_the_clients_products_in_every_round(
    federation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds: list[tuple[State, list[Update]]] = []
    combine = RoLoRA.combine

    def noted(self: RoLoRA, state: State, updates: Any, mean: Any) -> Update:
        rounds.append((state, updates := list(updates)))
        return combine(self, state, updates, mean)

    monkeypatch.setattr(RoLoRA, "combine", noted)
    last = federation(RoLoRA(), rounds=4).run().state
    states = [state for state, _ in rounds[1:]] + [last]
    for number, ((before, sent), now) in enumerate(zip(rounds, states, strict=True)):
        moving = product.FACTORS[1 - number % 2]
        assert [set(u.tensors) for u in sent] == [set(trees.select(before.weights, (moving,)))] * 3
        assert [u.weight for u in sent] == [6, 3, 4]
        parts = [(u.weight / 13, product.pairs(trees.add(before.weights, u.tensors))) for u in sent]
        for stem, (a, b) in product.pairs(now.weights).items():
            mean = sum(p * (pairs[stem].b @ pairs[stem].a) for p, pairs in parts)
            assert (b @ a).abs().max() > 1e-3
            assert torch.allclose(b @ a, mean, atol=1e-6)  # type: ignore[arg-type]


def test_after_two_rounds_both_factors_have_moved(federation: Make) -> None:
    run = federation(RoLoRA())
    one, two = (federation(RoLoRA(), rounds=n).run().state.weights for n in (1, 2))
    for name, initial in run.layout.initial.items():
        assert torch.equal(one[name], initial) == ("lora_A" in name)
        assert torch.equal(two[name], one[name]) == ("lora_B" in name)


def test_a_client_trains_the_factor_whose_turn_it_is_beside_the_other_at_rest(federation: Make) -> None:
    run = federation(RoLoRA())
    moved: State = Turns({name: tensor + 1 for name, tensor in run.layout.initial.items()}, turn=1)
    flow = run.method.local(View(ANN, 2, space=run.layout), run.method.message(moved, ANN))
    job = next(flow)
    assert isinstance(job, Fit)
    assert {n: t.tolist() for n, t in job.tensors.items()} == {n: t.tolist() for n, t in moved.weights.items()}
    assert list(trees.select(run.layout.initial, job.train)) == list(trees.select(run.layout.initial, ("lora_A",)))


def test_half_the_bytes_up_on_square_layers(federation: Make) -> None:
    square = LoRA(r=2, lora_alpha=4, target_modules=("q_proj",))
    half, whole = (federation(m, space=square).run().records for m in (RoLoRA(), FedIT()))
    for number in (1, 2):
        # What FedIT sends besides is a factor of two layers, 2 x 32 numbers of 4 bytes, for three clients, and names.
        assert whole[number]["bytes_up"] - half[number]["bytes_up"] >= 3 * 2 * 2 * 32 * 4


def test_which_factor_comes_first_is_a_setting() -> None:
    method = RoLoRA(first="A")
    state = method.start(LAYOUT)
    assert asked(method, state) == [A]
    assert asked(method, after(method, state, (1, {A: torch.ones(1, 2)}))) == [B]
    with pytest.raises(RecipeError, match="must be B or A, but is 'C'"):
        RoLoRA(first="C")  # type: ignore[arg-type]


def test_a_head_is_sent_in_every_round() -> None:
    method = RoLoRA()
    weights = {**LAYOUT.initial, HEAD: torch.zeros(1)}
    assert [asked(method, Turns(weights, turn=turn)) for turn in (0, 1)] == [[B, HEAD], [A, HEAD]]


def test_momentum_of_the_server_leaves_the_factor_at_rest() -> None:
    method, rule = RoLoRA(), Momentum(beta=0.5)
    state = method.start(LAYOUT)
    state = after(method, state, (1, {B: torch.ones(2, 1)}), rule=rule)
    state = after(method, state, (1, {A: torch.ones(1, 2)}), rule=rule)
    assert state.weights[B].tolist() == [[1.0], [1.0]]
    # B's own momentum waits for its turn: 1 + 0.5 x 1 on top of 1.
    state = after(method, state, (1, {B: torch.ones(2, 1)}), rule=rule)
    assert state.weights[B].tolist() == [[2.5], [2.5]]
    assert state.weights[A].tolist() == [[2.0, 3.0]]
