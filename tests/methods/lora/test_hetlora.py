"""HETLoRA: zero padding, weights by the norm of the products, clients that prune themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedfm.core import trees
from fedfm.core.client import View, work
from fedfm.core.jobs import Fit, Fitted, Job, Loss
from fedfm.core.mean import WeightedMean
from fedfm.core.update import Kind, Member, Tensors, Update
from fedfm.errors import RecipeError
from fedfm.federation import Federation
from fedfm.methods.lora import product
from fedfm.methods.lora.hetlora import HETLoRA, Ranked, Tail
from fedfm.rules import Add
from fedfm.spaces import LoRA

Make = Callable[..., Federation]
A, B = "x.lora_A.weight", "x.lora_B.weight"


def update(id: str, tensors: Tensors, weight: float = 1.0) -> Update:
    return Update(tensors, weight, kind=Kind.WEIGHTS, member=id)


def ones(rank: int, size: float = 1.0) -> dict[str, torch.Tensor]:
    return {A: torch.full((rank, 3), size), B: torch.full((2, rank), size)}


def local(method: HETLoRA, message: Tensors, factor: float) -> tuple[Tensors, Fit]:
    """What a client uploads whose training multiplies everything by ``factor``."""
    jobs: list[Fit] = []

    def answer(job: Job, client: View) -> Fitted:
        assert isinstance(job, Fit)
        jobs.append(job)
        return Fitted(trees.scale(job.tensors, factor), 1, 1, 0.0)

    return work(method, "local", View(Member("ann", 1), 1), message, answer).tensors, jobs[0]


def test_one_round_by_hand() -> None:
    # |B A| is 1 for ann, of rank 1, and 3 for bob, of rank 2, whatever they hold: weights 1/4 and 3/4.
    ann = {A: torch.tensor([[1.0, 0.0, 0.0]]), B: torch.tensor([[0.0], [1.0]])}
    bob = {A: torch.tensor([[0.0, 3.0, 0.0], [4.0, 4.0, 4.0]]), B: torch.tensor([[1.0, 0.0], [0.0, 0.0]])}
    method, state = HETLoRA(), Ranked(ones(3))
    combined = method.combine(state, [update("ann", ann, 100.0), update("bob", bob)], WeightedMean())
    after = method.apply(state, combined, Add())
    assert after.weights[A].tolist() == [[0.25, 2.25, 0.0], [3.0, 3.0, 3.0], [0.0, 0.0, 0.0]]
    assert after.weights[B].tolist() == [[0.75, 0.0, 0.0], [0.25, 0.0, 0.0]]


def test_equal_norms_are_the_uniform_mean() -> None:
    # The second is the first with the signs of both factors changed, so the products are equal; the others have none.
    sent = [update("ann", ones(2), 1.0), update("bob", trees.scale(ones(2), -1.0), 9.0), update("cid", ones(2), 2.0)]
    found = HETLoRA().combine(Ranked(ones(2)), sent, WeightedMean()).tensors
    assert all(torch.allclose(found[n], torch.full_like(t, 1 / 3)) for n, t in ones(2).items())
    sent = [update(id, {A: torch.full((1, 3), x), B: torch.zeros(2, 1)}) for id, x in (("ann", 1.0), ("bob", 3.0))]
    found = HETLoRA().combine(Ranked(ones(1)), sent, WeightedMean()).tensors
    assert found[A].tolist() == [[2.0, 2.0, 2.0]]  # before anybody moved, all count the same


def test_what_goes_down_is_the_leading_slice() -> None:
    state = Ranked(product.padded(ones(4), 5), ranks={"ann": 2, "bob": 3})
    for member, rank in ((Member("ann", 1, {"rank": 4}), 2), (Member("bob", 1), 3), (Member("cid", 1, {"rank": 4}), 4)):
        got = HETLoRA().message(state, member)
        assert torch.equal(got[A], state.weights[A][:rank])
        assert torch.equal(got[B], state.weights[B][:, :rank])


def test_the_penalty_by_hand() -> None:
    # The tail from rank 1 on: |(3, 4)| |(0, 2)| = 10 in one layer and |(1, 0)| |(6, 8)| = 10 in the other.
    weights = {A: torch.tensor([[9.0, 9.0], [3.0, 4.0]]), B: torch.tensor([[9.0, 0.0], [9.0, 2.0]])}
    weights |= {
        "y.lora_A.weight": torch.tensor([[9.0, 9.0], [1.0, 0.0]]),
        "y.lora_B.weight": torch.tensor([[9.0, 6.0], [9.0, 8.0]]),
    }
    assert float(Tail(0.1, 1)(weights, weights)) == pytest.approx(2.0)


def test_the_penalty_has_a_gradient_where_b_is_zero() -> None:
    weights = {A: torch.ones(2, 3, requires_grad=True), B: torch.zeros(2, 2, requires_grad=True)}
    Tail(1.0, 1)(weights, weights).backward()  # type: ignore[no-untyped-call]
    for tensor in weights.values():
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()


@pytest.mark.parametrize(("factor", "rank"), [(0.5, 4), (2.0, 8), (1.0, 8)])
def test_a_client_prunes_itself_only_when_the_penalty_fell(factor: float, rank: int) -> None:
    # gamma 0.5 of rank 8: the tail begins at 4.
    sent, job = local(HETLoRA(gamma=0.5, decay=0.1), ones(8), factor)
    assert job.terms == (Tail(0.1, 4),)
    assert torch.equal(sent[A], torch.full((rank, 3), factor))
    assert torch.equal(sent[B], torch.full((2, rank), factor))


def test_the_last_rank_stays() -> None:
    sent, job = local(HETLoRA(gamma=0.01), ones(2), 0.5)
    assert (job.terms, len(sent[A])) == ((Tail(1e-3, 1),), 1)
    sent, job = local(HETLoRA(gamma=0.01), ones(1), 0.5)
    assert (job.terms, len(sent[A])) == ((), 1)


def test_the_server_remembers_what_is_left() -> None:
    method, state = HETLoRA(gamma=0.5), Ranked(ones(8))
    ann, bob = Member("ann", 1, {"rank": 8}), Member("bob", 1, {"rank": 6})
    seen = []
    for factors in ({ann: 0.5, bob: 2.0}, {bob: 2.0}, {ann: 0.5, bob: 0.5}):  # ann misses the second round
        sent = [update(m.id, local(method, method.message(state, m), f)[0]) for m, f in factors.items()]
        after = method.apply(state, method.combine(state, sent, WeightedMean()), Add())
        assert isinstance(after, Ranked)
        state = after
        seen.append(tuple(len(method.message(state, m)[A]) for m in (ann, bob)))
    assert seen == [(4, 6), (4, 6), (2, 3)]
    assert dict(state.ranks) == {"ann": 2, "bob": 3}
    assert len(state.weights[A]) == 8
    assert set(state.weights) == {A, B}


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"gamma": 0.0}, "gamma must be above 0 and below 1, but is 0.0"),
        ({"gamma": 1.0}, "gamma must be above 0 and below 1, but is 1.0"),
        ({"decay": -0.1}, "decay must be at least 0, but is -0.1"),
    ],
)
def test_bad_settings_are_refused(setting: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        HETLoRA(**setting)


def test_a_run_prunes_and_scores_each_client_at_its_rank(federation: Make) -> None:
    # A heavy penalty drives the tail to nothing as soon as there is one, after the first round.
    method = HETLoRA(gamma=0.5, decay=50.0)
    run = federation(method, rounds=3, space=LoRA(r=4, lora_alpha=4), profiles={"rank": (1, 2, 4)})
    members = {id: run.plan.members.member(id) for id in run.ids}
    afforded = {id: int(member.profile["rank"]) for id, member in members.items()}
    assert max(afforded.values()) > 1
    outcome = run.run()
    state = outcome.state
    assert isinstance(state, Ranked)
    assert all(1 <= state.ranks[id] <= rank for id, rank in afforded.items())
    assert any(state.ranks[id] < rank for id, rank in afforded.items())
    for id, scores in outcome.records[-1]["validation"]["clients"].items():
        job = Loss(product.leading(state.weights, state.ranks[id]), split="validation")
        one = run.trainer.answer(job, View(members[id], 0))
        assert float(one.loss.sum() / one.count.sum()) == pytest.approx(scores["loss"], rel=1e-5)


def test_without_a_penalty_a_run_learns_and_no_rank_shrinks(federation: Make) -> None:
    run = federation(HETLoRA(decay=0.0), rounds=4, profiles={"rank": (1, 2)})
    outcome = run.run()
    assert isinstance(outcome.state, Ranked)
    assert outcome.state.ranks == {id: run.plan.members.member(id).profile["rank"] for id in run.ids}
    before, after = (outcome.records[at]["validation"]["global"]["loss"] for at in (0, -1))
    assert after < before
