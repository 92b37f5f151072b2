"""Ratatouille: two legs, another client's model to start from, one merge."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from fedfm.core.mean import WeightedMean
from fedfm.core.space import Layout
from fedfm.core.update import Member, Tensors, Update
from fedfm.errors import NoUpdates
from fedfm.federation import Federation
from fedfm.methods.merge.model_ratatouille import Legs, ModelRatatouille
from fedfm.methods.merge.model_soup_uniform import ModelSoupUniform
from fedfm.rules import Add

Make = Callable[..., Federation]


@dataclass
class Toy:
    """A server whose clients go half the way to a target of their own."""

    targets: Mapping[str, float]
    absent: tuple[str, ...] = ()
    received: list[dict[str, float]] = field(default_factory=list)
    round: int = 1

    mean = WeightedMean()
    rule = Add()
    space = Layout({})

    @property
    def members(self) -> tuple[Member, ...]:
        return tuple(Member(id, 10 * (i + 1)) for i, id in enumerate(self.targets))

    def ask(self, phase: str, messages: Mapping[Member, Tensors]) -> Iterator[Update]:
        self.received.append({m.id: t["w"].item() for m, t in messages.items()})
        for member, message in messages.items():
            if member.id not in self.absent:
                change = (self.targets[member.id] - message["w"]) / 2
                yield Update({"w": change}, weight=member.examples, member=member.id)

    def do(self, job: Any) -> Any:
        raise AssertionError("no job on the server")


def test_two_legs_by_hand() -> None:
    # Leg 1 from 0: a 4, b 2, c -1. Leg 2: a starts from b's 2 -> 5, b from c's -1 -> 1.5, c from a's 4 -> 1. Mean 2.5.
    method, toy = ModelRatatouille(), Toy({"a": 8.0, "b": 4.0, "c": -2.0})
    first = method.round(toy, Legs({"w": torch.tensor(0.0)}))
    assert isinstance(first, Legs)
    assert first.names == ("a", "b", "c")
    assert [m["w"].item() for m in first.auxiliary] == [4.0, 2.0, -1.0]
    assert first.weights["w"].item() == 0.0
    second = method.round(toy, first)
    assert toy.received == [{"a": 0.0, "b": 0.0, "c": 0.0}, {"a": 2.0, "b": -1.0, "c": 4.0}]
    assert second.weights["w"].item() == pytest.approx(2.5)
    assert second == Legs(second.weights)  # what is no longer needed is gone


def test_every_start_is_used_once_and_none_is_ones_own() -> None:
    names = tuple("abcdefg")
    state = Legs({}, names=names, auxiliary=tuple({"w": torch.tensor(float(i))} for i in range(7)))
    got = [ModelRatatouille().message(state, Member(id, 1))["w"].item() for id in names]
    assert sorted(got) == [float(i) for i in range(7)]
    assert all(start != own for own, start in enumerate(got))


def test_who_missed_the_first_leg_takes_part_in_the_second() -> None:
    method, toy = ModelRatatouille(), Toy({"a": 8.0, "b": 4.0, "c": -2.0}, absent=("b",))
    first = method.round(toy, Legs({"w": torch.tensor(0.0)}))
    assert isinstance(first, Legs)
    assert first.names == ("a", "c")
    toy.absent = ()
    # a and b start from c's -1 -> 3.5 and 1.5; c from a's 4 -> 1: mean 2.
    assert method.round(toy, first).weights["w"].item() == pytest.approx(2.0)
    assert toy.received[1] == {"a": -1.0, "b": -1.0, "c": 4.0}


def test_a_single_auxiliary_model_reduces_to_the_soup() -> None:
    # From 1: a (8 - 1)/2 = 3.5 -> 4.5, b 1.5 -> 2.5: the uniform soup of what starts at 1, 3.5.
    toy, start = Toy({"a": 8.0, "b": 4.0}), {"w": torch.tensor(1.0)}
    state = Legs({"w": torch.tensor(0.0)}, names=("z",), auxiliary=(start,))
    merged = ModelRatatouille().round(toy, state).weights["w"].item()
    uploads = [Update(u.tensors, 1.0, member=u.member) for u in toy.ask("local", dict.fromkeys(toy.members, start))]
    soup = ModelSoupUniform()
    base = Legs(start)
    assert merged == pytest.approx(
        soup.apply(base, soup.combine(base, uploads, WeightedMean()), Add()).weights["w"].item()
    )
    assert merged == pytest.approx(3.5)


def test_all_starts_descend_from_one_model(federation: Make) -> None:
    made = federation(ModelRatatouille(), rounds=7)
    initial = made.start().weights
    assert (made.plan.rounds, made.plan.training.max_steps) == (2, 7)  # seven rounds of two steps in two
    server = made.run()
    assert [sorted(r["participants"]) for r in server.records[1:]] == [["ann", "bob", "cid"]] * 2
    assert all(torch.equal(initial[n], t) for n, t in made.layout.initial.items())
    assert any(not torch.equal(initial[n], t) for n, t in server.state.weights.items())


def test_the_first_leg_changes_no_shared_weight_and_resumes(federation: Make, tmp_path: Path) -> None:
    whole = federation(ModelRatatouille()).run(tmp_path / "whole")
    cut = federation(ModelRatatouille())

    class Stop:
        def started(self, *args: Any) -> None: ...
        def stepped(self, steps: int) -> None: ...
        def finished(self, status: str) -> None: ...
        def round_finished(self, record: Mapping[str, Any]) -> None:
            if record["round"] == 1:
                cut.stop()

    halted = cut.run(tmp_path / "cut", observers=[Stop()])
    assert halted.status == "stopped"
    assert isinstance(halted.state, Legs)
    assert halted.state.names == ("ann", "bob", "cid")
    assert all(torch.equal(cut.layout.initial[n], t) for n, t in halted.state.weights.items())
    resumed = federation(ModelRatatouille()).run(tmp_path / "cut", resume=True)
    assert all(torch.equal(whole.state.weights[n], t) for n, t in resumed.state.weights.items())


def test_nobody_in_the_first_leg() -> None:
    with pytest.raises(NoUpdates):
        ModelRatatouille().round(Toy({"a": 1.0}, absent=("a",)), Legs({"w": torch.tensor(0.0)}))
