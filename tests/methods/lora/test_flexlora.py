"""FlexLoRA: one decomposition of the mean product, of which every client gets the best part of its rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from fedfm.core.client import View
from fedfm.core.jobs import Loss
from fedfm.core.mean import WeightedMean
from fedfm.core.method import State
from fedfm.core.update import Kind, Member, Tensors, Update
from fedfm.federation import Federation
from fedfm.methods.lora import product
from fedfm.methods.lora.flexlora import FlexLoRA
from fedfm.rules import Add
from fedfm.spaces import LoRA

Make = Callable[..., Federation]
A, B, HEAD = "x.lora_A.weight", "x.lora_B.weight", "score.weight"


def factors(rank: int, seed: int, out: int = 6, into: int = 9) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {A: torch.randn(rank, into, generator=g), B: torch.randn(out, rank, generator=g)}


def after(space: int, sent: Sequence[tuple[float, Tensors]]) -> State:
    """The state after a round in a space of that rank."""
    a, b = (t.shape for t in sent[0][1].values())
    state = State({A: torch.ones(space, a[1]), B: torch.zeros(b[0], space)})
    updates = [Update(t, w, kind=Kind.WEIGHTS, member=str(i)) for i, (w, t) in enumerate(sent)]
    return FlexLoRA().apply(state, FlexLoRA().combine(state, updates, WeightedMean()), Add())


def got(state: State, rank: int) -> Tensors:
    return FlexLoRA().message(state, Member("ann", 1, {"rank": rank}))


def test_by_hand() -> None:
    # Weights 1 and 3: 1/4 diag(2, 0) + 3/4 diag(0, 4) = diag(0.5, 3); the best of rank 1 is diag(0, 3).
    one = {A: torch.tensor([[2.0, 0.0]]), B: torch.tensor([[1.0], [0.0]])}
    two = {A: torch.tensor([[0.0, 4.0]]), B: torch.tensor([[0.0], [1.0]])}
    state = after(2, [(1, one), (3, two)])
    narrow, wide = got(state, 1), got(state, 2)
    assert torch.allclose(narrow[B] @ narrow[A], torch.diag(torch.tensor([0.0, 3.0])), atol=1e-6)
    assert torch.allclose(wide[B] @ wide[A], torch.diag(torch.tensor([0.5, 3.0])), atol=1e-6)
    assert torch.allclose(wide[A], torch.tensor([[0.0, 1.0], [1.0, 0.0]]), atol=1e-6)  # V^T, singular values in B
    assert torch.allclose(wide[B], torch.tensor([[0.0, 0.5], [3.0, 0.0]]), atol=1e-6)


def test_with_ranks_enough_the_result_is_the_mean_product() -> None:
    parts = [(float(k + 1), factors(2, k)) for k in range(3)]
    mean = sum(w / 6 * (t[B] @ t[A]) for w, t in parts)
    state = after(6, parts)
    assert torch.allclose(state.weights[B] @ state.weights[A], mean, atol=1e-5)  # type: ignore[arg-type]
    full = got(state, 6)
    assert all(torch.equal(t, full[n]) for n, t in state.weights.items())


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_a_client_of_a_smaller_rank_gets_the_best_approximation(rank: int) -> None:
    # Ranks 1, 2 and 4; the error of the best approximation is the norm of the singular values that are left.
    parts = [(2.0, factors(1, 0)), (1.0, factors(2, 1)), (1.0, factors(4, 2))]
    mean = sum(w / 4 * (t[B] @ t[A]) for w, t in parts)
    own = got(after(4, parts), rank)
    assert (own[A].shape, own[B].shape) == ((rank, 9), (6, rank))
    tail = torch.linalg.svdvals(mean)[rank:]  # type: ignore[arg-type]
    assert float((own[B] @ own[A] - mean).norm()) == pytest.approx(float(tail.norm()), abs=1e-5)


def test_one_decomposition_serves_all() -> None:
    state = after(8, [(1.0, factors(4, 0)), (1.0, factors(8, 1))])
    small, large = got(state, 4), got(state, 8)
    assert torch.equal(small[A], large[A][:4])
    assert torch.equal(small[B], large[B][:, :4])
    assert got(state, 99)[A].shape == (8, 9)


def test_no_rank_is_dead() -> None:
    # A rank whose row of A and column of B both are zero has no gradient. V^T has orthonormal rows also where the
    # singular value is zero, as when clients of rank 1 are all that came.
    wide = got(after(4, [(1.0, factors(1, 0)), (1.0, factors(1, 1))]), 4)
    assert torch.allclose(wide[A] @ wide[A].T, torch.eye(4), atol=1e-5)
    assert torch.allclose(wide[B][:, 2:], torch.zeros(6, 2), atol=1e-5)


def test_heads_are_averaged() -> None:
    state = State({**factors(2, 0), HEAD: torch.zeros(2)})
    sent = [
        Update({**factors(2, k), HEAD: torch.tensor([x, 0.0])}, w, kind=Kind.WEIGHTS, member=str(k))
        for k, w, x in ((1, 1, 4.0), (2, 3, 8.0))
    ]
    method = FlexLoRA()
    state = method.apply(state, method.combine(state, sent, WeightedMean()), Add())
    assert state.weights[HEAD].tolist() == [7.0, 0.0]  # 1/4 4 + 3/4 8
    assert method.message(state, Member("ann", 1, {"rank": 1}))[HEAD].tolist() == [7.0, 0.0]


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Update]:
    """All that clients send in runs."""
    seen: list[Update] = []
    combine = FlexLoRA.combine

    def noted(self: FlexLoRA, state: State, updates: Any, mean: Any) -> Update:
        seen.extend(updates := list(updates))
        return combine(self, state, updates, mean)

    monkeypatch.setattr(FlexLoRA, "combine", noted)
    return seen


def test_a_run_with_ranks_enough_is_the_mean_of_products(federation: Make, sent: list[Update]) -> None:
    state = federation(FlexLoRA(), rounds=1, space=LoRA(r=6, lora_alpha=4), profiles={"rank": (2,)}).run().state
    parts = [(u.weight / 13, product.pairs(u.tensors)) for u in sent]
    assert [p for p, _ in parts] == [6 / 13, 3 / 13, 4 / 13]
    for stem, (a, b) in product.pairs(state.weights).items():
        mean = sum(p * (pairs[stem].b @ pairs[stem].a) for p, pairs in parts)
        assert (b @ a).abs().max() > 1e-4
        assert torch.allclose(b @ a, mean, atol=1e-6)  # type: ignore[arg-type]


def test_a_run_of_mixed_ranks_scores_each_client_at_its_rank(federation: Make, sent: list[Update]) -> None:
    run = federation(FlexLoRA(), rounds=3, space=LoRA(r=4, lora_alpha=4), profiles={"rank": (1, 2, 4)})
    outcome = run.run()
    members = {id: run.plan.members.member(id) for id in run.ids}
    ranks = {id: int(member.profile["rank"]) for id, member in members.items()}
    assert len(set(ranks.values())) > 1
    assert {u.member: product.largest_rank(u.tensors) for u in sent} == ranks
    losses = [record["validation"]["global"]["loss"] for record in outcome.records]
    assert losses[-1] < losses[0]
    for id, scores in outcome.records[-1]["validation"]["clients"].items():
        one = run.trainer.answer(Loss(got(outcome.state, ranks[id]), split="validation"), View(members[id], 0))
        assert float(one.loss.sum() / one.count.sum()) == pytest.approx(scores["loss"], rel=1e-5)
