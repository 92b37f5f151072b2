"""The mixing of FedAsync: by hand, and against plain addition."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedfm.errors import RecipeError
from fedfm.federation import Federation
from fedfm.methods.fedavg import FedAvg
from fedfm.rules import Add
from fedfm.schedule.buffered import Buffered
from fedfm.schedule.mixing import Mixing
from tests.schedule.test_buffered import Toy

Make = Callable[..., Federation]


def mixing(alpha: float, **changes: Any) -> Mixing:
    return Mixing(alpha, jitter=0.0, **changes)


def test_three_arrivals_by_hand() -> None:
    # Tasks take 1 (a), 2.5 (b); alpha = 1/2, s(u) = (1 + u)^-1.
    # 1: a from 0 to its half way 4; w = 0 + 1/2 (4 - 0) = 2.
    # 2: a from 2 to 5; w = 2 + 1/2 (5 - 2) = 3.5.
    # 2.5: b from 0 to 1, two versions old: alpha_t = 1/6; w = 3.5 + 1/6 (1 - 3.5) = 3.0833.
    toy = Toy({"a": 8.0, "b": 2.0}, {"a": 1.0, "b": 2.5})
    assert toy.run(mixing(0.5, power=1.0), 3) == pytest.approx([2.0, 3.5, 3.08333], abs=1e-5)
    assert toy.notes["staleness"] == [{"client": "b", "staleness": 2}]
    assert toy.notes["simulated_time"] == 2.5
    assert toy.notes["version"] == 3


def test_alpha_one_without_discount_replaces_the_model() -> None:
    # b's half way from 0 is 1, whatever a did before.
    toy = Toy({"a": 8.0, "b": 2.0}, {"a": 1.0, "b": 2.5})
    assert toy.run(mixing(1.0, discount="constant"), 3)[2] == pytest.approx(1.0)


def test_the_server_rule_gets_the_mixed_change() -> None:
    toy = Toy({"a": 8.0}, {"a": 1.0})
    toy.rule = Add(0.5)  # type: ignore[misc]
    assert toy.run(mixing(0.5), 1) == [1.0]  # 0 + 1/2 * 1/2 * (4 - 0)


def test_one_client_at_a_time_with_alpha_one_is_a_buffer_of_one(federation: Make) -> None:
    one = federation(FedAvg(), schedule=Mixing(1.0, concurrency=1), rounds=4).run()
    other = federation(FedAvg(), schedule=Buffered(1, concurrency=1), rounds=4).run()
    assert [r["staleness"] for r in one.records[1:]] == [r["staleness"] for r in other.records[1:]]
    assert all(torch.equal(one.state.weights[n], t) for n, t in other.state.weights.items())


def test_what_is_too_old_is_dropped_and_the_next_one_used() -> None:
    toy = Toy({"a": 8.0, "b": 2.0}, {"a": 1.0, "b": 2.5})
    after = toy.run(mixing(0.5, power=1.0, max_staleness=1), 3)
    # In place of b at 2.5: a at 3, from 3.5 to 5.75.
    assert after == pytest.approx([2.0, 3.5, 4.625])
    assert [d["client"] for d in toy.dropped] == ["b"]


def test_a_resumed_run_is_equal_bit_for_bit(federation: Make, tmp_path: Path) -> None:
    def make(rounds: int) -> Federation:
        return federation(FedAvg(), schedule=Mixing(sigma=0.3), rounds=rounds)

    whole = make(5).run(tmp_path / "whole")
    assert max(s["staleness"] for r in whole.records[1:] for s in r["staleness"]) > 0
    make(2).run(tmp_path / "cut")
    (tmp_path / "cut/status.json").unlink()
    resumed = make(5).run(tmp_path / "cut", resume=True)
    assert all(torch.equal(whole.state.weights[n], t) for n, t in resumed.state.weights.items())


@pytest.mark.parametrize("alpha", [0.0, 1.1, -1.0, float("nan")])
def test_a_share_that_is_none_is_refused(alpha: float) -> None:
    with pytest.raises(RecipeError) as caught:
        Mixing(alpha)
    assert str(caught.value) == f"Mixing alpha must be above 0 and at most 1, but is {alpha}."
