"""FedDC: drift is learnt and put back."""

from __future__ import annotations

import pytest
import torch

from fedfm.core.plan import Plan, Training
from fedfm.errors import RecipeError
from fedfm.methods.fedavg import FedAvg
from fedfm.methods.optim.feddc import FedDC
from fedfm.sample import Uniform
from tests.conftest import People
from tests.methods.optim.quadratic import Quadratics, apart


def test_a_first_round_by_hand() -> None:
    # No drift and no control yet; alpha has no slope at the received weights. a: t = 2 moves by 1, b: t = -4 by -2.
    # Drifts are 1 and -2, their mean -0.5; w = mean(1, -2) + (-0.5) = -1. Controls as in SCAFFOLD: -2, 4; c = 1.
    clients = Quadratics({"a": (2.0, 0.0), "b": (-4.0, 0.0)}, rate=0.5)
    state = clients.run(FedDC(alpha=1.0), 1)
    assert state.weights["w"].tolist() == pytest.approx([-1.0, 0.0])
    assert state.drift["w"].tolist() == pytest.approx([-0.5, 0.0])
    assert state.control["w"].tolist() == pytest.approx([1.0, 0.0])
    assert clients.private["a"]["h:w"].tolist() == pytest.approx([1.0, 0.0])
    assert clients.private["a"]["w"].tolist() == pytest.approx([-2.0, 0.0])


def test_a_second_task_by_hand() -> None:
    # w = -1, h_a = 1, c = 1, c_a = -2, alpha = 1. Gradient of a at -1: -3; of the penalty (h + v - w): 1; of the
    # correction c - c_a: 3. In all 1, so a step of 0.5 goes to -1.5: a change of -0.5. h_a = 1 - 0.5.
    clients = Quadratics({"a": (2.0, 0.0), "b": (-4.0, 0.0)}, rate=0.5)
    state = clients.run(FedDC(alpha=1.0), 1)
    update = clients.ask(FedDC(alpha=1.0), state, "a", 2)
    assert update.tensors["w"].tolist() == pytest.approx([-0.5, 0.0])
    assert clients.private["a"]["h:w"].tolist() == pytest.approx([0.5, 0.0])
    # c_a' = c_a - c + (w - y) / (K eta) = -2 - 1 + 0.5 / 0.5 = -2.
    assert clients.private["a"]["w"].tolist() == pytest.approx([-2.0, 0.0])


def test_absent_clients_count_in_the_mean_drift() -> None:
    clients = Quadratics({"a": (2.0, 0.0), "b": (-4.0, 0.0)}, rate=0.5)
    state = clients.run(FedDC(alpha=1.0), 1, cohort=lambda round: ["a"])
    assert state.drift["w"].tolist() == pytest.approx([0.5, 0.0])
    assert state.weights["w"].tolist() == pytest.approx([1.5, 0.0])


def test_it_finds_the_optimum_that_fedavg_misses() -> None:
    clients = apart()
    assert torch.allclose(clients.run(FedDC(alpha=0.1), 200).weights["w"], clients.optimum(), atol=1e-2)
    assert not torch.allclose(apart().run(FedAvg(), 200).weights["w"], clients.optimum(), atol=0.1)


def test_only_plain_sgd_will_do() -> None:
    with pytest.raises(RecipeError, match=r"training\.optim must be sgd"):
        FedDC().plan(Plan(People({}), Uniform(), Training(), 1))
