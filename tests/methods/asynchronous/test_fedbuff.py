"""FedBuff as a method: its parts, its equivalence, its settings."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fedfm.errors import RecipeError
from fedfm.federation import Federation
from fedfm.methods.asynchronous.fedbuff import FedBuff
from fedfm.methods.fedavg import FedAvg
from fedfm.schedule import Synchronous
from fedfm.schedule.buffered import Buffered

Make = Callable[..., Federation]


def test_it_brings_its_schedule(federation: Make) -> None:
    made = federation(FedBuff(buffer=2, concurrency=3, power=1.0, max_staleness=7, sigma=0.2))
    assert made.schedule == Buffered(2, concurrency=3, power=1.0, max_staleness=7, sigma=0.2)
    with pytest.raises(RecipeError, match="fedbuff brings its own schedule"):
        federation(FedBuff(), schedule=Synchronous())


def test_a_full_cohort_is_fedavg_with_uniform_weights(federation: Make) -> None:
    one = federation(FedAvg(weighting="clients")).run()
    other = federation(FedBuff(buffer=3)).run()
    assert all(torch.equal(one.state.weights[n], t) for n, t in other.state.weights.items())


def test_a_small_buffer_uses_stale_uploads(federation: Make) -> None:
    records = federation(FedBuff(buffer=1, sigma=0.3), rounds=4).run().records
    assert max(s["staleness"] for r in records[1:] for s in r["staleness"]) > 0
    assert [r["version"] for r in records[1:]] == [1, 2, 3, 4]


def test_a_wrong_setting_is_refused_at_once() -> None:
    with pytest.raises(RecipeError, match="Buffered buffer must be at least 1, but is 0"):
        FedBuff(buffer=0)
