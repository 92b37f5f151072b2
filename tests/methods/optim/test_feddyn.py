"""FedDyn: stationary for all where it is stationary for the mean."""

from __future__ import annotations

import pytest
import torch

from fedfm.methods.fedavg import FedAvg
from fedfm.methods.optim.feddyn import FedDyn
from tests.methods.optim.quadratic import Quadratics, apart


def test_a_first_round_by_hand() -> None:
    # alpha 1, one step of 0.5 from 0: the proximal term has no slope at 0. a: t = 2 moves by 1, b: t = -4 by -2.
    # h = 0 - 1/2 (1 - 2) = 0.5; w = mean(1, -2) - h / 1 = -0.5 - 0.5 = -1. g_a = -1, g_b = 2.
    clients = Quadratics({"a": (2.0, 0.0), "b": (-4.0, 0.0)}, rate=0.5)
    state = clients.run(FedDyn(alpha=1.0), 1)
    assert state.weights["w"].tolist() == pytest.approx([-1.0, 0.0])
    assert state.drift["w"].tolist() == pytest.approx([0.5, 0.0])
    assert clients.private["a"]["w"].tolist() == pytest.approx([-1.0, 0.0])
    assert clients.private["b"]["w"].tolist() == pytest.approx([2.0, 0.0])


def test_a_second_task_by_hand() -> None:
    # g = -1 kept, message 0: the loss gets -<g, v> = v, so the gradient of (v - 2)^2 / 2 at 0 is -2 + 1 = -1: to 0.5.
    clients = Quadratics({"a": (2.0, 2.0)}, rate=0.5, private={"a": {"w": torch.tensor([-1.0, -1.0])}})
    update = clients.ask(FedDyn(alpha=1.0), FedDyn().start(clients.layout), "a")
    assert update.tensors["w"].tolist() == pytest.approx([0.5, 0.5])
    assert clients.private["a"]["w"].tolist() == pytest.approx([-1.5, -1.5])


def test_it_finds_the_optimum_that_fedavg_misses() -> None:
    clients = apart()
    found = clients.run(FedDyn(alpha=1.0), 150).weights["w"]
    assert torch.allclose(found, clients.optimum(), atol=1e-3)
    assert not torch.allclose(apart().run(FedAvg(), 150).weights["w"], clients.optimum(), atol=0.1)


def test_at_the_optimum_each_client_keeps_its_own_gradient() -> None:
    clients = apart()
    clients.run(FedDyn(alpha=1.0), 200)
    for id, a in (("a", 4.0), ("b", 1.0)):
        gradient = a * (clients.optimum() - torch.tensor(clients.targets[id]))
        assert torch.allclose(clients.private[id]["w"], gradient, atol=1e-2)


def test_absent_clients_count_in_the_drift() -> None:
    clients = Quadratics({"a": (2.0, 0.0), "b": (-4.0, 0.0)}, rate=0.5)
    state = clients.run(FedDyn(alpha=1.0), 1, cohort=lambda round: ["a"])
    # Only a moved, by 1: h = -1/2, over N = 2 and not over the one that took part.
    assert state.drift["w"].tolist() == pytest.approx([-0.5, 0.0])
