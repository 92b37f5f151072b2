"""FLoRA: stacks whose product is the mean of the products, and a base that is the same for everybody."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from fedfm.core import trees
from fedfm.core.client import View, work
from fedfm.core.jobs import Fitted, Job, Loss, Scores
from fedfm.core.mean import WeightedMean
from fedfm.core.space import Layout
from fedfm.core.update import Member, Tensors, Update
from fedfm.federation import Federation
from fedfm.methods.lora import product
from fedfm.methods.lora.flora_stacking import FLoRA, Stacks
from fedfm.rules import Add
from fedfm.sample import Uniform

Make = Callable[..., Federation]
A, B, HEAD = "x.lora_A.weight", "x.lora_B.weight", "score.weight"
LAYOUT = Layout({A: torch.ones(4, 3), B: torch.zeros(2, 4), HEAD: torch.zeros(1)})
ANN, BOB, CID = Member("ann", 1, {"rank": 1}), Member("bob", 2, {"rank": 2}), Member("cid", 5, {"rank": 4})


@dataclass
class Toy:
    """Clients that add random numbers to what they train; notes every job and who had which message."""

    private: dict[str, Tensors] = field(default_factory=dict)
    jobs: list[Any] = field(default_factory=list)
    messages: list[Tensors] = field(default_factory=list)

    def answer(self, job: Job, client: View) -> Any:
        self.jobs.append(job)
        if isinstance(job, Loss):
            return Scores(torch.zeros(1), torch.ones(1), {})
        draw = client.draw("toy")
        return Fitted({n: t + torch.randn(t.shape, generator=draw) for n, t in job.tensors.items()}, 1, 1, 0.0)

    def ask(self, phase: str, state: Stacks, member: Member, round: int, lost: bool = False) -> Update:
        """The update of a member; if it is lost on its way, nothing that the member did lasts."""
        view = View(member, round, self.private.get(member.id, {}), LAYOUT)
        self.messages.append(FLoRA().message(state, member))
        update = work(FLoRA(), phase, view, self.messages[-1], self.answer)
        if view.kept is not None and not lost:
            self.private[member.id] = view.kept
        return Update(update.tensors, update.weight, update.metrics, update.kind, member.id)

    def round(self, state: Stacks, members: Sequence[Member], round: int) -> Stacks:
        sent = [self.ask("local", state, member, round) for member in members]
        after = FLoRA().apply(state, FLoRA().combine(state, sent, WeightedMean()), Add())
        assert isinstance(after, Stacks)
        return after


def start() -> Stacks:
    state = FLoRA().start(LAYOUT)
    assert isinstance(state, Stacks)
    return state


def test_one_round_by_hand() -> None:
    # Weights 1 and 3: 1/4 [4; 0] [1 2 0] + 3/4 ([0; 4] [0 0 1] + [4; 4] [1 0 0]) = [1 2 0; 0 0 0] + [3 0 0; 3 0 3].
    one = {A: torch.tensor([[1.0, 2.0, 0.0]]), B: torch.tensor([[4.0], [0.0]]), HEAD: torch.tensor([4.0])}
    two = {A: torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]), B: torch.tensor([[0.0, 4.0], [4.0, 4.0]])}
    sent = [Update(one, 1, member="ann"), Update({**two, HEAD: torch.tensor([8.0])}, 3, member="bob")]
    state = FLoRA().apply(start(), FLoRA().combine(start(), sent, WeightedMean()), Add())
    assert isinstance(state, Stacks)
    (patch,) = state.patches
    assert (patch[A].shape, patch[B].shape) == ((3, 3), (2, 3))  # rank 1 + 2
    assert (patch[B] @ patch[A]).tolist() == [[4.0, 2.0, 0.0], [3.0, 0.0, 3.0]]
    assert {n: t.tolist() for n, t in state.weights.items()} == {HEAD: [7.0]}  # 1/4 4 + 3/4 8
    assert dict(state.seen) == {"client:ann": 0, "client:bob": 0}  # what they sent is still to be brought to them


def test_lora_starts_anew_in_each_round_with_the_client_s_rank() -> None:
    toy, state = Toy(), start()
    for round in (1, 2):
        state = toy.round(state, (ANN, BOB, CID), round)
    assert [len(job.tensors[A]) for job in toy.jobs] == [1, 2, 4, 1, 2, 4]
    assert not any(job.tensors[B].any() for job in toy.jobs)
    first = [tuple(job.tensors[A][0].tolist()) for job in toy.jobs]
    assert len(set(first)) == 6
    assert [len(job.patches) for job in toy.jobs] == [0, 0, 0, 1, 1, 1]
    assert len({job.tensors[HEAD].item() for job in toy.jobs}) == 2  # the head goes on: one value in each round


def test_who_missed_rounds_ends_with_the_same_base() -> None:
    toy, state = Toy(), start()
    for round, members in enumerate([(ANN, BOB), (ANN,), (ANN, BOB), (ANN,)], 1):
        state = toy.round(state, members, round)
    for member in (ANN, BOB, CID):
        toy.ask("validate", state, member, 5)
    everything, missed, never = toy.jobs[-3:]
    assert [sum(A in name for name in m) for m in toy.messages[-3:]] == [1, 2, 4]
    for job in (everything, missed, never):
        assert len(job.patches) == 4
        for patch, of in zip(job.patches, state.patches, strict=True):
            assert patch.keys() == of.keys()
            assert all(torch.equal(t, of[n]) for n, t in patch.items())
    # Rank 1 + 2, 1, 1 + 2 and 1; the stacks together are the sum of what the rounds did.
    whole = FLoRA().result(state, LAYOUT)
    assert [len(patch[A]) for patch in state.patches] == [3, 1, 3, 1]
    assert len(whole[A]) == 8
    total = sum(patch[B] @ patch[A] for patch in state.patches)
    assert torch.allclose(whole[B] @ whole[A], total, atol=1e-5)  # type: ignore[arg-type]
    assert torch.equal(whole[HEAD], state.weights[HEAD])


def test_bytes_grow_with_the_rank_of_what_was_missed() -> None:
    toy, state = Toy(), start()
    for round in range(1, 4):
        state = toy.round(state, (ANN, BOB), round)
    # Four bytes times 3 + 2 numbers times rank 3 for each of three rounds, and a head of one number.
    assert [trees.nbytes(FLoRA().message(state, m)) for m in (ANN, CID)] == [4 * 5 * 3 + 4, 4 * 5 * 9 + 4]


def test_an_upload_that_was_lost_brings_the_same_stacks_again() -> None:
    toy, state = Toy(), start()
    state = toy.round(state, (ANN, BOB), 1)
    toy.ask("local", state, BOB, 2, lost=True)
    state = toy.round(state, (ANN,), 2)
    toy.ask("local", state, BOB, 3)
    assert sum(A in name for name in toy.messages[-1]) == 2
    assert len(toy.jobs[-1].patches) == 2


def test_a_run_scores_the_merged_base_on_every_client(federation: Make) -> None:
    run = federation(FLoRA(), rounds=3, sampler=Uniform(count=1), profiles={"rank": (1, 2)})
    outcome = run.run()
    state = outcome.state
    assert isinstance(state, Stacks)
    assert len(state.patches) == 3
    assert len(state.seen) < 3  # somebody never took part
    losses = [record["validation"]["global"]["loss"] for record in outcome.records]
    assert losses[3] < losses[0]
    whole = run.result(state)
    ranks = [product.largest_rank(patch) for patch in state.patches]
    assert product.largest_rank(whole) == sum(ranks)
    assert set(ranks) <= {1, 2}
    for id, scores in outcome.records[-1]["validation"]["clients"].items():
        one = run.trainer.answer(Loss(whole, split="validation"), View(run.plan.members.member(id), 0))
        assert float(one.loss.sum() / one.count.sum()) == pytest.approx(scores["loss"], rel=1e-5)
