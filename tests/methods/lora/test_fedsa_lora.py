"""FedSA-LoRA: A is averaged, B stays where it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from fedfm.core import trees
from fedfm.core.client import View, work
from fedfm.core.jobs import Fit, Fitted, Job, Loss
from fedfm.core.mean import WeightedMean
from fedfm.core.space import Layout
from fedfm.core.update import Member, Tensors
from fedfm.federation import Federation
from fedfm.methods.lora.fedit import FedIT
from fedfm.methods.lora.fedsa_lora import FedSALoRA
from fedfm.rules import Add
from fedfm.spaces import LoRA
from fedfm.store.clients import ClientStore

Make = Callable[..., Federation]
A, B = "x.lora_A.weight", "x.lora_B.weight"
START = {A: torch.tensor([[1.0, 2.0]]), B: torch.zeros(2, 1)}


@dataclass
class Toy:
    """A client that adds its own number to all that is trained."""

    member: Member
    step: float
    private: Tensors = field(default_factory=dict)
    started: list[Tensors] = field(default_factory=list)

    def answer(self, job: Job, client: View) -> Fitted:
        assert isinstance(job, Fit)
        tensors = {**START, **job.tensors}
        self.started.append(tensors)
        return Fitted({n: t + self.step for n, t in tensors.items()}, 1, 1, 0.0)

    def local(self, message: Tensors) -> object:
        view = View(self.member, 1, self.private, Layout(START))
        update = work(FedSALoRA(), "local", view, message, self.answer)
        assert view.kept is not None
        self.private = view.kept
        return update


def test_two_rounds_by_hand() -> None:
    # Weights 1 and 3, steps 4 and 8: A moves by 1/4 4 + 3/4 8 = 7 a round; each B by its own client's step.
    method, ann, bob = FedSALoRA(), Toy(Member("ann", 1), 4.0), Toy(Member("bob", 3), 8.0)
    state = method.start(Layout(START))
    for round in (1, 2):
        updates = [toy.local(method.message(state, toy.member)) for toy in (ann, bob)]
        assert [list(u.tensors) for u in updates] == [[A], [A]]  # type: ignore[attr-defined]
        state = method.apply(state, method.combine(state, updates, WeightedMean()), Add())  # type: ignore[arg-type]
        assert {n: t.tolist() for n, t in state.weights.items()} == {A: [[1.0 + 7 * round, 2.0 + 7 * round]]}
        for toy in (ann, bob):
            assert {n: t.tolist() for n, t in toy.private.items()} == {B: [[toy.step * round]] * 2}
    for before in zip(ann.started, bob.started, strict=True):
        assert torch.equal(before[0][A], before[1][A])
    assert [s[B][0, 0].item() for s in (*ann.started, *bob.started)] == [0.0, 4.0, 0.0, 8.0]


def test_who_takes_part_for_the_first_time_starts_from_the_first_b() -> None:
    toy = Toy(Member("late", 1), 1.0)
    toy.local({A: torch.tensor([[9.0, 9.0]])})
    assert (toy.started[0][A].tolist(), toy.started[0][B].tolist()) == ([[9.0, 9.0]], [[0.0], [0.0]])


def test_a_run(federation: Make, tmp_path: Path) -> None:
    run = federation(FedSALoRA(), rounds=3)
    outcome = run.run(tmp_path / "run")
    initial, state = run.layout.initial, outcome.state
    shared, own = (set(trees.select(initial, (x,))) for x in ("lora_A", "lora_B"))
    assert set(state.weights) == shared
    assert all(not torch.equal(t, initial[n]) for n, t in state.weights.items())
    store = ClientStore(tmp_path / "run/clients")
    kept = {id: store.get(id) for id in run.ids}
    assert all(set(tensors) == own for tensors in kept.values())
    for name in own:
        bs = [tensors[name] for tensors in kept.values()]
        assert all(b.any() for b in bs)
        assert not any(torch.allclose(bs[i], bs[j], atol=1e-4) for i, j in ((0, 1), (0, 2), (1, 2)))

    scores = outcome.records[-1]["validation"]["clients"]
    for id in run.ids:
        client = View(run.plan.members.member(id), 0)
        for other in run.ids:
            job = Loss({**state.weights, **kept[other]}, split="validation")
            one = run.trainer.answer(job, client)
            loss = float(one.loss.sum() / one.count.sum())
            assert (loss == pytest.approx(scores[id]["loss"], rel=1e-5)) == (id == other)
    before, after = (outcome.records[at]["validation"]["mean"]["loss"] for at in (0, -1))
    assert after < before


def test_the_test_split_is_scored_with_each_client_s_own_b(federation: Make, tmp_path: Path) -> None:
    run = federation(FedSALoRA())
    state = run.run(tmp_path / "run").state
    own = run.assess(state, "test", ClientStore(tmp_path / "run/clients"))
    without = run.assess(state, "test")  # B is zero, so this is the model before training
    assert own is not None
    assert without is not None
    assert own.mean["loss"] < without.mean["loss"] - 0.001
    assert without.mean["loss"] == pytest.approx(run.assess(run.start(), "test").mean["loss"])  # type: ignore[union-attr]


def test_half_the_bytes_on_square_layers(federation: Make) -> None:
    square = LoRA(r=2, lora_alpha=4, target_modules=("q_proj",))
    half, whole = (federation(m, space=square) for m in (FedSALoRA(), FedIT()))
    assert trees.nbytes(half.start().weights) == 2 * 2 * 32 * 4  # two layers, 2 x 32 numbers of 4 bytes
    assert trees.nbytes(half.start().weights) * 2 == trees.nbytes(whole.start().weights)
