"""The buffer of FedBuff: by hand, against FedAvg, resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from fedfm.core.mean import WeightedMean
from fedfm.core.method import Method, Server, State
from fedfm.core.space import Layout
from fedfm.core.traits import Trait
from fedfm.core.update import Kind, Member, Tensors, Update
from fedfm.errors import Incompatible, NoUpdates, RecipeError
from fedfm.federation import Federation
from fedfm.methods.fedavg import FedAvg
from fedfm.robust import Krum
from fedfm.rules import Add
from fedfm.rules.momentum import Momentum
from fedfm.sample import Uniform
from fedfm.schedule.buffered import Buffered
from fedfm.schedule.clock import Asynchronous
from fedfm.wire.topk import TopK
from tests.conftest import People

Make = Callable[..., Federation]


@dataclass
class Toy:
    """A server whose clients send half the way from what they received to a target of their own.

    Args:
        targets: of each client.
        times: that each client takes for a task.
        broken: who never answers.
    """

    targets: Mapping[str, float]
    times: Mapping[str, float]
    broken: tuple[str, ...] = ()
    dropped: list[dict[str, str]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    asked: list[tuple[str, int, float]] = field(default_factory=list)

    mean = WeightedMean()
    rule = Add()
    space = Layout({"w": torch.zeros(1)})
    federation = SimpleNamespace(screens=())
    link = SimpleNamespace(simulated=True)

    @property
    def ids(self) -> list[str]:
        return sorted(self.targets)

    @property
    def members(self) -> tuple[Member, ...]:
        return tuple(map(self.member, self.ids))

    def member(self, id: str) -> Member:
        return Member(id, 7, {"speed": 1 / self.times[id]})

    def ask(self, phase: str, messages: Mapping[Member, Tensors], round: int | None = None) -> Iterator[Update]:
        for member in sorted(messages, key=lambda m: m.id):
            start = messages[member]["w"]
            self.asked.append((member.id, round or 0, start.item()))
            if member.id not in self.broken:
                change = (self.targets[member.id] - start) / 2
                yield Update({"w": change}, weight=member.examples, member=member.id)

    def run(self, schedule: Asynchronous, steps: int, method: Method | None = None) -> list[float]:
        """The weight after each server update."""
        state, memory, after = State({"w": torch.zeros(1)}), {}, []
        for _ in range(steps):
            state, memory = schedule.advance(method or Method(), self, state, memory)  # type: ignore[arg-type,assignment]
            after.append(state.weights["w"].item())
        self.memory = memory
        return after


def buffered(buffer: int, **changes: Any) -> Buffered:
    return Buffered(buffer, jitter=0.0, **changes)


def test_two_versions_by_hand() -> None:
    # Tasks take 1 (a), 2 (b), 3.5 (c); everyone is in flight; w = 0. At time 2, a and b are there: changes 8/2 = 4 and
    # 2/2 = 1, mean 2.5, w = 2.5. They start again from 2.5. At 3, a again: (8 - 2.5)/2 = 2.75, fresh. At 3.5, c, from
    # w = 0, one version old: 6/2 = 3, times 1/sqrt(2) = 2.1213. w = 2.5 + (2.75 + 2.1213)/2 = 4.9357.
    toy = Toy({"a": 8.0, "b": 2.0, "c": 6.0}, {"a": 1.0, "b": 2.0, "c": 3.5})
    assert toy.run(buffered(2), 2) == pytest.approx([2.5, 4.9357], abs=1e-4)
    assert toy.notes["version"] == 2
    assert toy.notes["simulated_time"] == pytest.approx(3.5)
    assert toy.notes["staleness"] == [{"client": "a", "staleness": 0}, {"client": "c", "staleness": 1}]
    # c answers with the message of version 0 and in the round after it, although that is long past.
    assert toy.asked == [("a", 1, 0.0), ("b", 1, 0.0), ("c", 1, 0.0), ("a", 2, 2.5)]


def test_uploads_count_equally_whatever_their_examples() -> None:
    class Sized(Toy):
        def member(self, id: str) -> Member:
            return replace(super().member(id), examples={"a": 1, "b": 1000}[id])

    assert Sized({"a": 8.0, "b": 2.0}, {"a": 1.0, "b": 2.0}).run(buffered(2), 1) == [2.5]


def test_a_full_cohort_without_staleness_is_fedavg_with_uniform_weights(federation: Make) -> None:
    one = federation(FedAvg(weighting="clients"), rounds=3).run()
    other = federation(FedAvg(), schedule=Buffered(3), rounds=3).run()
    assert all(torch.equal(one.state.weights[n], t) for n, t in other.state.weights.items())
    assert [r["version"] for r in other.records[1:]] == [1, 2, 3]
    assert {s["staleness"] for r in other.records[1:] for s in r["staleness"]} == {0}


def test_it_differs_from_fedavg_when_uploads_are_stale(federation: Make) -> None:
    one = federation(FedAvg(weighting="clients"), rounds=3).run()
    other = federation(FedAvg(), schedule=Buffered(2), rounds=3).run()
    assert not all(torch.equal(one.state.weights[n], t) for n, t in other.state.weights.items())
    assert max(s["staleness"] for r in other.records[1:] for s in r["staleness"]) > 0


def test_the_clock_seed_fixes_the_events(federation: Make) -> None:
    def events(seed: int) -> list[Any]:
        records = federation(FedAvg(), schedule=Buffered(1), rounds=4, seed=seed).run().records
        return [(r["simulated_time"], r["staleness"]) for r in records[1:]]

    assert events(1) == events(1)
    assert events(1) != events(2)
    times = [time for time, _ in events(1)]
    assert times == sorted(times)


@pytest.mark.parametrize("rule", [Add(), Momentum()], ids=["add", "momentum"])
def test_a_resumed_run_is_equal_bit_for_bit(federation: Make, tmp_path: Path, rule: Any) -> None:
    # One upload a step with two in flight: the other is under way from an older version at every checkpoint.
    def make(rounds: int) -> Federation:
        return federation(FedAvg(), schedule=Buffered(1, concurrency=2), rounds=rounds, rule=rule)

    whole = make(5).run(tmp_path / "whole")
    assert max(s["staleness"] for r in whole.records[1:] for s in r["staleness"]) > 0
    make(3).run(tmp_path / "cut")
    (tmp_path / "cut/status.json").unlink()
    resumed = make(5).run(tmp_path / "cut", resume=True)
    assert [r["staleness"] for r in resumed.records[1:]] == [r["staleness"] for r in whole.records[1:]]
    assert resumed.records[5]["simulated_time"] == whole.records[5]["simulated_time"]
    assert all(torch.equal(whole.state.weights[n], t) for n, t in resumed.state.weights.items())


def test_only_states_that_are_needed_are_kept() -> None:
    toy = Toy({"a": 8.0, "b": 2.0, "c": 6.0}, {"a": 1.0, "b": 1.5, "c": 1000.0})
    toy.run(buffered(1), 50)
    assert "0" in toy.memory["states"]  # c is still at work on it
    assert {str(task[2]) for task in toy.memory["flying"]} == set(toy.memory["states"])
    assert len(toy.memory["states"]) <= 2


def test_what_is_too_old_is_dropped_and_named() -> None:
    # c starts at version 0 and finishes at 3.5, when a has made three versions and b one.
    toy = Toy({"a": 8.0, "b": 2.0, "c": 6.0}, {"a": 1.0, "b": 2.2, "c": 3.5})
    toy.run(buffered(1, max_staleness=3), 5)
    assert toy.dropped == [{"client": "c", "reason": "stale: 4 versions are more than the 3 allowed"}]
    assert ("c", 1, 0.0) not in toy.asked  # it need not even be trained
    kept = Toy({"a": 8.0, "b": 2.0, "c": 6.0}, {"a": 1.0, "b": 2.2, "c": 3.5})
    kept.run(buffered(1, max_staleness=4), 5)
    assert kept.dropped == []
    assert kept.notes["staleness"] == [{"client": "c", "staleness": 4}]


def test_who_fails_is_replaced_by_the_next_to_arrive() -> None:
    toy = Toy({"a": 8.0, "b": 2.0, "c": 6.0}, {"a": 1.0, "b": 2.0, "c": 3.5}, broken=("a",))
    # a fails at 1; b (change 1) and c (change 3) fill the buffer: w = 2.
    assert toy.run(buffered(2), 1) == [2.0]
    assert toy.notes["simulated_time"] == 3.5


def test_a_buffer_larger_than_what_can_come_is_used_as_it_is() -> None:
    toy = Toy({"a": 8.0, "b": 2.0}, {"a": 1.0, "b": 2.0})
    assert toy.run(buffered(10), 1) == [2.5]
    assert toy.run(buffered(10, concurrency=1), 1) == [2.5]  # one after the other, but the same


def test_when_everybody_fails_the_round_says_so() -> None:
    toy = Toy({"a": 8.0, "b": 2.0}, {"a": 1.0, "b": 2.0}, broken=("a", "b"))
    with pytest.raises(NoUpdates, match="everybody was asked, and nobody's update could be used"):
        toy.run(buffered(1), 1)
    assert [client for client, _, _ in toy.asked] == ["a", "b"]


def test_the_sampler_says_how_many_are_in_flight(federation: Make) -> None:
    make = federation(FedAvg(), schedule=Buffered(1), sampler=Uniform(count=1), rounds=3)
    records = make.run().records
    # One at a time: nothing is ever stale.
    assert {s["staleness"] for r in records[1:] for s in r["staleness"]} == {0}


def test_the_memory_is_plain() -> None:
    toy = Toy({"a": 8.0, "b": 2.0}, {"a": 1.0, "b": 2.0})
    toy.run(buffered(1), 2)

    def plain(value: Any) -> bool:
        if isinstance(value, Mapping):
            return all(isinstance(k, str) and plain(v) for k, v in value.items())
        if isinstance(value, tuple):
            return all(map(plain, value))
        return isinstance(value, (int, float, str, torch.Tensor))

    assert plain(toy.memory)


def test_what_cannot_be_asynchronous_is_refused(federation: Make, people: People) -> None:
    @dataclass(frozen=True)
    class Knowing(Method):
        sends: ClassVar[Kind] = Kind.KNOWLEDGE

    @dataclass(frozen=True)
    class Exchanging(Method):
        def round(self, server: Server, state: State) -> State:
            return state

    with pytest.raises(Incompatible, match="Buffered weighs changes of weights, but Knowing sends knowledge"):
        federation(Knowing(), schedule=Buffered(1))
    with pytest.raises(Incompatible, match="but Exchanging has rounds of its own"):
        federation(Exchanging(), schedule=Buffered(1))
    with pytest.raises(Incompatible, match=r"needs FORGETFUL .* which TopK takes away\. Use a synchronous"):
        federation(FedAvg(), schedule=Buffered(1), stages=(TopK(0.5),))
    with pytest.raises(Incompatible, match="Krum compares the uploads of one round, which Buffered does not have"):
        federation(FedAvg(), schedule=Buffered(1), screens=(Krum(0),))


def test_it_needs_what_the_design_says_and_uploads_alike_in_all_rounds() -> None:
    more = {Trait.ALIGNED, Trait.STEADY}
    assert Buffered.needs == {Trait.LINEAR, Trait.VISIBLE, Trait.ONE_ASK, Trait.FORGETFUL} | more
    assert Buffered.id == "buffered"


@pytest.mark.parametrize(
    ("setting", "allowed"),
    [
        ({"buffer": 0}, "at least 1"),
        ({"concurrency": -1}, "at least 1, or 0 for as many as the sampler draws"),
        ({"power": -0.5}, "at least 0 and finite"),
        ({"sigma": float("inf")}, "at least 0 and finite"),
        ({"grace": -1}, "at least 0"),
        ({"max_staleness": -2}, "at least 0, or -1 to drop none"),
        ({"discount": "linear"}, "one of constant, polynomial, hinge"),
    ],
)
def test_bad_settings_are_refused(setting: dict[str, Any], allowed: str) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(RecipeError) as caught:
        Buffered(**setting)
    assert str(caught.value) == f"Buffered {name} must be {allowed}, but is {value!r}."
