"""FedProx: a penalty on the distance to the global weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fedfm.core.client import View
from fedfm.core.update import Member, Tensors
from fedfm.federation import Federation
from fedfm.methods.fedavg import FedAvg
from fedfm.methods.optim.fedprox import FedProx
from tests.conftest import FAST
from tests.methods.optim.quadratic import Quadratics

Make = Callable[..., Federation]
CLIENT = View(Member("ann", 5), 1)


def same(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def test_two_steps_by_hand() -> None:
    # From 1 with t = 5, mu = 2, rate 0.25. First slope -4 + 2 * 0 = -4: 2. Second -3 + 2 * (2 - 1) = -1: 2.25.
    clients = Quadratics({"a": (5.0, 0.0)}, rate=0.25, steps=2)
    assert clients.run(FedProx(mu=2.0), 1, start=(1.0, 0.0)).weights["w"].tolist() == pytest.approx([2.25, 0.0])


def test_the_local_optimum_lies_between() -> None:
    # argmin (a/2)(v - t)^2 + (mu/2)(v - w)^2 = (a t + mu w) / (a + mu) = (1 * 5 + 3 * 1) / 4 = 2 for one, and
    # (3 * -1 + 3 * 1) / 6 = 0 for the other: the mean by examples is (3 * 2 + 0) / 4.
    clients = Quadratics({"a": (5.0, 0.0), "b": (-1.0, 0.0)}, {"b": 3.0}, steps=100, examples={"a": 3})
    assert clients.run(FedProx(mu=3.0), 1, start=(1.0, 0.0)).weights["w"].tolist() == pytest.approx([1.5, 0.0])


def test_the_added_gradient() -> None:
    received = {"w": torch.tensor([1.0, -2.0])}
    (term,) = FedProx(mu=0.5).terms(CLIENT, received)
    weights = {"w": torch.tensor([3.0, -3.0], requires_grad=True)}
    # 0.25 (2^2 + 1^2) = 1.25 and 0.5 (2, -1).
    value = term(weights, received)
    value.backward()  # type: ignore[no-untyped-call]
    assert value.item() == 1.25
    assert weights["w"].grad is not None
    assert weights["w"].grad.tolist() == [1.0, -0.5]


def test_without_mu_nothing_is_added_and_it_is_fedavg_bit_for_bit(federation: Make) -> None:
    assert FedProx(mu=0.0).terms(CLIENT, {"w": torch.ones(1)}) == ()
    one, other = (federation(method).run().state.weights for method in (FedProx(mu=0.0), FedAvg()))
    assert same(one, other)


def test_the_first_step_is_that_of_fedavg_and_the_second_is_not(federation: Make) -> None:
    for steps in (1, 2):
        training = replace(FAST, max_steps=steps, optim="sgd", learning_rate=0.5, max_grad_norm=0)
        runs = [federation(m, rounds=1, training=training).run().state.weights for m in (FedProx(mu=1.0), FedAvg())]
        assert same(*runs) == (steps == 1)


def test_the_larger_mu_the_nearer_clients_stay() -> None:
    moved = []
    for mu in (0.001, 0.01, 0.1, 1.0):
        clients, method = Quadratics({"a": (4.0, 0.0)}, steps=5), FedProx(mu=mu)
        moved.append(float(clients.ask(method, method.start(clients.layout), "a").tensors["w"][0]))
    assert moved[0] > moved[1] > moved[2] > moved[3] > 0


def test_stragglers_send_what_they_have(federation: Make) -> None:
    made = federation(FedProx(), rounds=1, training=replace(FAST, max_steps=4), profiles={"work": (0.25, 1.0)})
    shares = {id: made.plan.members.member(id).profile["work"] for id in made.ids}
    assert set(shares.values()) == {0.25, 1.0}
    participants = made.run().records[1]["participants"]
    assert {id: p["steps"] for id, p in participants.items()} == {id: 4 * share for id, share in shares.items()}
