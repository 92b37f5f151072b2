"""What every published method must do. Walks the package: a new method is tested without any list being edited."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedfm import parts
from fedfm.core import trees
from fedfm.core.client import View, work
from fedfm.core.jobs import Fit, Job
from fedfm.core.mean import WeightedMean
from fedfm.core.method import Method
from fedfm.core.traits import Trait
from fedfm.core.update import Kind, Update
from fedfm.federation import Federation
from fedfm.rules import Add
from fedfm.spaces import Full, LoRA
from fedfm.store.checkpoint import Checkpoints
from fedfm.wire.codec import decode, encode
from tests.conftest import FAST, People

Make = Callable[..., Federation]
METHODS = [cls for folder, cls in parts.published() if folder == "methods"]
each = pytest.mark.parametrize("kind", METHODS, ids=lambda cls: cls.id)


def space_for(kind: type[Method]) -> Any:
    return {"full": Full(), "lora": LoRA(r=2, lora_alpha=4)}[kind.spaces[0] if kind.spaces else "lora"]


@dataclass
class Ready:
    """A federation of a method with its state before the first round."""

    federation: Federation

    def __post_init__(self) -> None:
        self.method = self.federation.method
        self.state = self.method.start(self.federation.bench.space)
        self.members = [self.federation.plan.members.member(i) for i in self.federation.ids]

    def update(self, index: int, jobs: list[Job] | None = None, view: View | None = None) -> Update:
        """What a client sends."""
        member = self.members[index]

        def answer(job: Job, client: View) -> Any:
            if jobs is not None:
                jobs.append(job)
            return self.federation.trainer.answer(job, client)

        return work(self.method, "local", view or View(member, 1), self.method.message(self.state, member), answer)


@pytest.fixture
def ready(kind: type[Method], federation: Make) -> Ready:
    return Ready(federation(kind(), space=space_for(kind)))


@each
def test_it_is_documented(kind: type[Method]) -> None:
    assert kind.paper is not None
    assert kind.paper.title
    assert kind.__doc__
    assert kind.id == kind.__module__.rpartition(".")[2].replace("_", "-")
    for field in fields(kind):
        assert f"{field.name}:" in kind.__doc__, f"{field.name} is not explained"


@each
def test_the_paper_stands_at_the_top(kind: type[Method]) -> None:
    import importlib

    about = importlib.import_module(kind.__module__).__doc__ or ""
    if kind.paper and kind.paper.arxiv:
        assert kind.paper.arxiv in about
        assert kind.paper.title in " ".join(about.split())
    else:
        assert "reference" in about.splitlines()[0]


@each
def test_only_train_gets_gradients_and_only_share_travels(ready: Ready) -> None:
    initial, jobs = ready.federation.bench.space.initial, []
    update = ready.update(0, jobs)
    shared = set(trees.select(initial, ready.method.share))
    if update.kind is not Kind.KNOWLEDGE:
        assert set(update.tensors) == shared
    assert set(ready.method.message(ready.state, ready.members[0])) <= shared
    assert [job for job in jobs if isinstance(job, Fit)]
    for job in jobs:
        if isinstance(job, Fit):
            assert set(trees.select(initial, job.train)) == set(trees.select(initial, ready.method.train))


@each
def test_linear_is_observed(ready: Ready) -> None:
    updates = [ready.update(i) for i in range(len(ready.members))]
    one = WeightedMean()(updates)
    apart = ready.method.combine(ready.state, updates, WeightedMean())
    together = ready.method.combine(ready.state, [one], WeightedMean())
    equal = all(torch.allclose(apart.tensors[n], together.tensors[n], atol=1e-6) for n in apart.tensors)
    assert equal == (Trait.LINEAR in ready.method.traits)


@each
def test_forgetful_is_observed(kind: type[Method], federation: Make, tmp_path: Path) -> None:
    federation(kind(), space=space_for(kind), rounds=1).run(tmp_path / "run")
    kept = list((tmp_path / "run/clients").glob("*/*")) if (tmp_path / "run/clients").exists() else []
    assert (not kept) == (Trait.FORGETFUL in kind.traits)


@each
def test_aligned_is_observed(ready: Ready) -> None:
    shapes = [{n: t.shape for n, t in ready.update(i).tensors.items()} for i in range(len(ready.members))]
    assert all(s == shapes[0] for s in shapes) == (Trait.ALIGNED in ready.method.traits)


@each
def test_server_hooks_are_pure(ready: Ready) -> None:
    updates = [ready.update(i) for i in range(len(ready.members))]
    before = trees.clone(ready.state.weights)
    sent = [trees.clone(u.tensors) for u in updates]
    combined = ready.method.combine(ready.state, updates, WeightedMean())
    ready.method.apply(ready.state, combined, Add())
    assert all(torch.equal(before[n], ready.state.weights[n]) for n in before)
    assert all(torch.equal(s[n], u.tensors[n]) for s, u in zip(sent, updates, strict=True) for n in s)


@each
def test_updates_and_state_round_trip(ready: Ready, tmp_path: Path) -> None:
    update = ready.update(0)
    back = decode(encode(update), update.member)
    assert (back.weight, back.kind, back.metrics) == (update.weight, update.kind, update.metrics)
    assert all(torch.equal(back.tensors[n], t) for n, t in update.tensors.items())
    Checkpoints(tmp_path).write(1, ready.state, {})
    found = Checkpoints(tmp_path).read(type(ready.state))
    assert found is not None
    assert all(torch.equal(found[1].weights[n], t) for n, t in ready.state.weights.items())


@each
def test_resumed_equals_uninterrupted(kind: type[Method], federation: Make, tmp_path: Path) -> None:
    """The second run starts as after a kill: with a client's newer state and a line of the lost round left over."""
    whole = federation(kind(), space=space_for(kind), rounds=3).run(tmp_path / "whole")
    federation(kind(), space=space_for(kind), rounds=2).run(tmp_path / "cut")
    for client in (tmp_path / "cut/clients").glob("*"):
        (client / "00000003.safetensors").write_bytes((client / "00000002.safetensors").read_bytes())
    with (tmp_path / "cut/metrics.jsonl").open("a") as file:
        file.write('{"round": 3}\n{"torn')
    (tmp_path / "cut/status.json").unlink()
    resumed = federation(kind(), space=space_for(kind), rounds=3).run(tmp_path / "cut", resume=True)
    assert [r["round"] for r in resumed.records] == [0, 1, 2, 3]
    assert all(torch.equal(whole.state.weights[n], t) for n, t in resumed.state.weights.items())
    for path in (tmp_path / "whole/clients").glob("*/00000003.safetensors"):
        other = load_file(tmp_path / "cut/clients" / path.parent.name / path.name)
        assert all(torch.equal(other[n], t) for n, t in load_file(path).items())


@each
def test_order_and_sizes_of_clients(kind: type[Method], federation: Make, people: People) -> None:
    turned = People({c: people.data[c] for c in reversed(people.ids)})
    runs = [federation(kind(), members=m, space=space_for(kind), rounds=1).run() for m in (people, turned)]
    assert all(torch.equal(runs[0].state.weights[n], t) for n, t in runs[1].state.weights.items())
    alone = federation(kind(), members=people.only("bob"), space=space_for(kind), rounds=1, training=FAST).run()
    assert len(alone.records[1]["participants"]) == 1
