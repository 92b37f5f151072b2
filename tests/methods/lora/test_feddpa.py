"""FedDPA: a global adapter that travels, a local one that does not, and a gate for each example between them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedfm.core import trees
from fedfm.core.client import View, work
from fedfm.core.jobs import Call, Features, Fit, Fitted, Job, Loss, Scores
from fedfm.core.space import Layout
from fedfm.core.update import Member, Tensors
from fedfm.errors import RecipeError
from fedfm.federation import Federation
from fedfm.methods.lora.feddpa import FedDPA
from fedfm.methods.lora.fedit import FedIT
from fedfm.store.clients import ClientStore
from tests.conftest import People

Make = Callable[..., Federation]
A, B, HEAD = "x.lora_A.weight", "x.lora_B.weight", "score.weight"
START = {A: torch.ones(1, 3), B: torch.zeros(2, 1), HEAD: torch.zeros(1)}
MESSAGE = {A: torch.full((1, 3), 5.0), B: torch.full((2, 1), 4.0), HEAD: torch.ones(1)}
ANN = Member("ann", 7)


class Toy:
    """Adds 2 to all that is trained; hidden states are given."""

    def __init__(self, states: Tensors, private: Tensors | None = None) -> None:
        self.states = states
        self.view = View(ANN, 1, private or {}, Layout(START))
        self.jobs: list[Any] = []

    def __call__(self, job: Job, client: View) -> Any:
        self.jobs.append(job)
        if isinstance(job, Fit):
            tensors = {n: t + 2.0 if trees.matches(n, job.train) else t for n, t in job.tensors.items()}
            return Fitted(tensors, 3, 6, 0.5)
        if isinstance(job, Features):
            return self.states[job.split]
        return len(self.states[job.split]) if isinstance(job, Call) else Scores(torch.zeros(2), torch.ones(2), {})


def test_gates_by_hand() -> None:
    # Known: (1, 0) and (0, 1). Cosines of (3, 4): 0.6 and 0.8, mean 0.7; of (-1, 0): -1 and 0; of (2, 0): 1 and 0.
    known = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    states = torch.tensor([[3.0, 4.0], [-1.0, 0.0], [2.0, 0.0]])
    assert FedDPA(scale=0.5).gate(states, known).tolist() == pytest.approx([0.35, 0.0, 0.25])
    assert FedDPA(scale=1.0).gate(states, known).tolist() == pytest.approx([0.7, 0.0, 0.5])
    assert FedDPA(scale=1.0).gate(known[:1] * 9, known[:1]).tolist() == pytest.approx([1.0])


def test_first_the_global_adapter_then_the_local_one_beside_it() -> None:
    toy = Toy({"train": torch.arange(12.0).view(6, 2)})
    update = work(FedDPA(mix=0.25, examples=4), "local", toy.view, MESSAGE, toy)
    shared, local, features = toy.jobs
    assert shared.train == ("*",)
    assert not shared.patches
    assert all(torch.equal(shared.tensors[n], t) for n, t in MESSAGE.items())
    # The global adapter is now A 7 and B 6; it counts 3/4, by its B. The local one begins as at the start: A 1, B 0.
    (beside,) = local.patches
    assert {n: t.flatten()[0].item() for n, t in beside.items()} == {A: 7.0, B: 4.5}
    assert {n: t.flatten()[0].item() for n, t in local.tensors.items()} == {A: 1.0, B: 0.0, HEAD: 3.0}
    assert local.train == ("lora_A", "lora_B")
    assert local.purpose != shared.purpose
    # It ends at A 3 and B 2, which is a quarter of its own B 8.
    own = trees.marked("local", toy.view.kept)  # type: ignore[arg-type]
    assert {n: t.flatten().tolist() for n, t in own.items()} == {A: [3.0] * 3, B: [8.0] * 2}
    assert all(torch.equal(features.tensors[n], t) for n, t in own.items())
    # Up goes the change of the global adapter and its head: 2 each.
    assert {n: t.unique().tolist() for n, t in update.tensors.items()} == {A: [2.0], B: [2.0], HEAD: [2.0]}
    assert update.weight == 7
    assert dict(update.metrics) == {"loss": 0.5, "steps": 3, "examples": 6}
    kept = toy.view.kept["examples"].tolist()  # type: ignore[index]
    assert len(kept) == len({tuple(x) for x in kept}) == 4
    assert all(x in toy.states["train"].tolist() for x in kept)
    # In the next round its B 8 counts a quarter: training starts at 2, ends at 4, and 16 is kept.
    later = Toy({"train": torch.ones(2, 2)}, toy.view.kept)
    work(FedDPA(mix=0.25), "local", later.view, MESSAGE, later)
    assert later.jobs[1].tensors[B].flatten().tolist() == [2.0, 2.0]
    assert later.view.kept[f"local:{B}"].flatten().tolist() == [16.0, 16.0]  # type: ignore[index]
    assert later.view.kept["examples"].shape == (2, 2)  # type: ignore[index]  # no more than there are


def test_scoring_concatenates_the_adapters_and_gates_their_ranks() -> None:
    # Cosines to the only known example: 1 and 0, so that a is 0.5 and 0.
    own = {A: torch.full((1, 3), 3.0), B: torch.full((2, 1), 8.0)}
    private = {**trees.mark("local", own), "examples": torch.tensor([[1.0, 0.0]])}
    toy = Toy({"test": torch.tensor([[2.0, 0.0], [0.0, 1.0]])}, private)
    work(FedDPA(), "test", toy.view, MESSAGE, toy)
    loss = toy.jobs[-1]
    assert isinstance(loss, Loss)
    assert loss.split == "test"
    assert loss.tensors[A].tolist() == [[5.0] * 3, [3.0] * 3]
    assert loss.tensors[B].tolist() == [[4.0, 8.0]] * 2
    assert torch.equal(loss.tensors[HEAD], MESSAGE[HEAD])
    assert loss.gate is not None
    assert torch.allclose(loss.gate, torch.tensor([[0.5, 0.5], [1.0, 0.0]]))


@pytest.mark.parametrize(("private", "rows"), [({}, 2), ({f"local:{A}": torch.ones(1, 3)}, 0)])
def test_without_a_local_adapter_or_rows_the_global_one_is_scored(private: Tensors, rows: int) -> None:
    toy = Toy({"validation": torch.ones(rows, 2)}, private)
    work(FedDPA(), "validate", toy.view, MESSAGE, toy)
    assert toy.jobs[-1].gate is None
    assert {n: t.tolist() for n, t in toy.jobs[-1].tensors.items()} == {n: t.tolist() for n, t in MESSAGE.items()}


Ran = tuple[Federation, Any, dict[str, Tensors]]


@pytest.fixture
def ran(federation: Make, tmp_path: Path) -> Ran:
    """A run, its outcome and what the clients kept."""
    run = federation(FedDPA())
    outcome = run.run(tmp_path / "run")
    store = ClientStore(tmp_path / "run/clients")
    return run, outcome, {id: store.get(id) for id in run.ids}


def scored(ran: Ran, id: str, job: Job) -> Scores:
    scores = ran[0].trainer.answer(job, View(ran[0].plan.members.member(id), 0))
    assert isinstance(scores, Scores)
    return scores


def test_the_local_adapter_never_travels(ran: Ran, federation: Make) -> None:
    run, outcome, kept = ran
    plain = federation(FedIT()).run()
    assert outcome.state.weights.keys() == plain.state.weights.keys()
    # Whatever is done with the local adapters, the global one is that of FedIT bit for bit, and so is the traffic.
    assert all(torch.equal(t, plain.state.weights[n]) for n, t in outcome.state.weights.items())
    for ours, theirs in zip(outcome.records[1:], plain.records[1:], strict=True):
        assert (ours["bytes_up"], ours["bytes_down"]) == (theirs["bytes_up"], theirs["bytes_down"])
    own = [trees.marked("local", tensors) for tensors in kept.values()]
    assert all(tensors.keys() == run.layout.initial.keys() for tensors in own)
    assert trees.norm(trees.subtract(own[0], own[1])) > 0.01
    assert {tuple(tensors["examples"].shape) for tensors in kept.values()} == {(5, 32), (3, 32), (4, 32)}


@pytest.mark.parametrize("id", ["ann", "bob", "cid"])
def test_the_mixture_is_that_of_two_adapters_merged_by_hand(ran: Ran, id: str) -> None:
    run, outcome, kept = ran
    shared, own = outcome.state.weights, trees.marked("local", kept[id])
    states = run.trainer.answer(Features(own, split="validation"), View(run.plan.members.member(id), 0))
    gates = FedDPA().gate(states, kept[id]["examples"])
    assert len(gates) == 2
    assert all(0 < a <= 0.5 for a in gates)
    total, count = 0.0, 0
    for at, a in enumerate(gates.tolist()):
        # Merged into the base: W + (1 - a) s B_g A_g + a s B_l A_l; the LoRA layers themselves add nothing.
        merged = tuple({n: t * f if "lora_B" in n else t for n, t in x.items()} for x, f in ((shared, 1 - a), (own, a)))
        one = scored(ran, id, Loss({}, split="validation", patches=merged))
        total, count = total + float(one.loss[at]), count + int(one.count[at])
    found = outcome.records[-1]["validation"]["clients"][id]["loss"]
    assert total / count == pytest.approx(found, rel=1e-5)
    alone = scored(ran, id, Loss(shared, split="validation"))
    assert float(alone.loss.sum()) / count != pytest.approx(found, rel=1e-4)


@pytest.mark.parametrize("a", [0.0, 1.0])
def test_at_its_ends_the_mixture_is_one_of_the_two(ran: Ran, monkeypatch: pytest.MonkeyPatch, a: float) -> None:
    run, outcome, kept = ran
    monkeypatch.setattr(FedDPA, "gate", lambda self, states, known: torch.full((len(states),), a))
    for id in run.ids:
        member = run.plan.members.member(id)
        view = View(member, 0, kept[id], run.layout)
        tally = work(FedDPA(), "test", view, run.method.message(outcome.state, member), run.trainer.answer).tensors
        alone = trees.marked("local", kept[id]) if a else outcome.state.weights
        assert float(tally["loss"]) == pytest.approx(float(scored(ran, id, Loss(alone, split="test")).loss.sum()))


def test_rows_of_which_no_example_can_be_made_are_nothing_to_score(federation: Make, people: People) -> None:
    silent = [{"messages": [{"role": "user", "content": "no answer"}]}]
    ann = {**people.data["ann"], "validation": silent}
    records = federation(FedDPA(), rounds=1, members=People({**people.data, "ann": ann})).run().records
    assert [sorted(record["validation"]["clients"]) for record in records] == [["bob", "cid"]] * 2


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"scale": 0.0}, "FedDPA scale must be above 0 and at most 1, but is 0.0"),
        ({"scale": 1.5}, "FedDPA scale must be above 0 and at most 1, but is 1.5"),
        ({"mix": 0.0}, "FedDPA mix must be above 0 and at most 1, but is 0.0"),
        ({"examples": 0}, "FedDPA examples must be at least 1, but is 0"),
    ],
)
def test_bad_settings_are_refused(setting: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        FedDPA(**setting)
