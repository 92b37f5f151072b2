"""The uniform soup: once, equal weights, a learning rate for each client."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fedfm.core.client import View, work
from fedfm.core.jobs import Fit, Fitted, Job
from fedfm.core.mean import WeightedMean
from fedfm.core.method import State
from fedfm.core.space import Layout
from fedfm.core.update import Member, Update
from fedfm.errors import RecipeError
from fedfm.federation import Federation
from fedfm.methods.fedavg import FedAvg
from fedfm.methods.merge.model_soup_uniform import ModelSoupUniform
from fedfm.rules import Add
from fedfm.sample import Uniform
from tests.conftest import FAST

Make = Callable[..., Federation]


def factor(client: str, rates: tuple[float, float], seed: int = 0) -> float:
    """The factor on the learning rate that a client draws."""
    asked: list[float] = []

    def answer(job: Job, view: View) -> Fitted:
        assert isinstance(job, Fit)
        asked.append(job.rate)
        return Fitted(dict(job.tensors), 1, 1, 0.0)

    view = View(Member(client, 5), 1, space=Layout({}, seed=seed))
    work(ModelSoupUniform(rates=rates), "local", view, {"w": torch.zeros(1)}, answer)
    return asked[0]


def test_one_round_uniform_fedavg_is_the_same(federation: Make) -> None:
    one = federation(ModelSoupUniform(rates=(1.0, 1.0)), rounds=1).run()
    other = federation(FedAvg(weighting="clients"), rounds=1).run()
    assert all(torch.equal(one.state.weights[n], t) for n, t in other.state.weights.items())


def test_the_work_of_all_rounds_is_done_in_one(federation: Make) -> None:
    # Two steps in each of six rounds in which a client takes part every third time: four.
    plan = federation(ModelSoupUniform(), rounds=6, sampler=Uniform(count=1)).plan
    assert (plan.rounds, plan.sampler, plan.training.max_steps) == (1, Uniform(), 4)
    epochs = replace(FAST, max_steps=-1, num_train_epochs=0.5)
    plan = federation(ModelSoupUniform(), rounds=6, training=epochs).plan
    assert (plan.rounds, plan.training.max_steps, plan.training.num_train_epochs) == (1, -1, 3.0)
    one = federation(ModelSoupUniform(rates=(1.0, 1.0)), rounds=3).run()
    other = federation(FedAvg(weighting="clients"), rounds=1, training=replace(FAST, max_steps=6)).run()
    assert all(torch.equal(one.state.weights[n], t) for n, t in other.state.weights.items())


def test_every_client_sends_exactly_once_whatever_the_recipe_says(federation: Make) -> None:
    records = federation(ModelSoupUniform(), rounds=5, sampler=Uniform(count=1)).run().records
    assert [sorted(r["participants"]) for r in records[1:]] == [["ann", "bob", "cid"]]
    assert {p["weight"] for p in records[1]["participants"].values()} == {1.0}


def test_copies_of_one_model_return_it() -> None:
    state = State({"w": torch.tensor([1.0, -2.0])})
    copies = [Update({"w": torch.tensor([0.5, 0.1])}, member=str(i)) for i in range(7)]
    method = ModelSoupUniform()
    soup = method.apply(state, method.combine(state, copies, WeightedMean()), Add())
    assert torch.equal(soup.weights["w"], torch.tensor([1.5, -1.9]))


def test_learning_rates_are_log_uniform_and_belong_to_the_client() -> None:
    # ln of the factor is uniform on [-2, 1]: mean -0.5, standard deviation of 1000 draws 3 / sqrt(12000) = 0.027.
    rates = (math.exp(-2.0), math.exp(1.0))
    logs = [math.log(factor(f"c{i}", rates)) for i in range(1000)]
    assert min(logs) >= -2.0
    assert max(logs) <= 1.0
    assert sum(logs) / 1000 == pytest.approx(-0.5, abs=0.14)
    assert sum(x < -0.5 for x in logs) == pytest.approx(500, abs=80)
    assert factor("ann", rates) == factor("ann", rates)
    assert factor("ann", rates) != factor("bob", rates)
    assert factor("ann", rates) != factor("ann", rates, seed=1)
    assert factor("ann", (0.7, 0.7)) == 0.7


def test_clients_train_at_their_own_rate(federation: Make) -> None:
    participants = federation(ModelSoupUniform(rates=(0.5, 2.0))).run().records[1]["participants"]
    rates = [p["learning_rate"] for p in participants.values()]
    assert len(set(rates)) == 3
    assert all(0.5e-2 <= rate <= 2e-2 for rate in rates)


@pytest.mark.parametrize("rates", [(0.0, 1.0), (2.0, 1.0), (1.0, math.inf), (math.nan, 1.0)])
def test_rates_that_cannot_be_drawn_are_refused(rates: tuple[float, float]) -> None:
    with pytest.raises(RecipeError, match="rates must be two finite numbers above 0, the smaller one first"):
        ModelSoupUniform(rates=rates)
