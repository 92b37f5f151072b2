"""FedNova: changes by step, times the mean number of steps."""

from __future__ import annotations

import pytest
import torch

from fedfm.core.jobs import Fitted
from fedfm.methods.fedavg import FedAvg
from fedfm.methods.optim.fednova import FedNova
from fedfm.methods.optim.fedprox import FedProx
from tests.methods.optim.quadratic import Quadratics


def test_a_round_by_hand() -> None:
    # Rate 0.5. a: t = 2 takes one step, to 1. b: t = -4 takes two, to -2 and -3. By step: 1 and -1.5; their mean -0.25;
    # the mean number of steps 1.5: w = -0.375. FedAvg would give -1.
    clients = Quadratics({"a": (2.0, 0.0), "b": (-4.0, 0.0)}, rate=0.5, steps={"a": 1, "b": 2})
    assert clients.run(FedNova(), 1).weights["w"].tolist() == pytest.approx([-0.375, 0.0])


def test_with_equal_steps_it_is_fedavg() -> None:
    runs = [
        Quadratics({"a": (1.0, 0.0), "b": (-3.0, 2.0)}, steps=3, examples={"b": 4}).run(m, 5)
        for m in (FedNova(), FedAvg())
    ]
    assert torch.allclose(runs[0].weights["w"], runs[1].weights["w"], atol=1e-6)


def test_more_steps_do_not_pull_the_optimum() -> None:
    # Small steps, ten times as many on a: FedAvg ends near a's target, FedNova near the middle.
    def clients() -> Quadratics:
        return Quadratics({"a": (1.0, 0.0), "b": (-1.0, 0.0)}, steps={"a": 10, "b": 1}, rate=0.01)

    found, averaged = (float(clients().run(m, 300).weights["w"][0]) for m in (FedNova(), FedAvg()))
    assert abs(found) < 0.1
    assert averaged > 0.5


@pytest.mark.parametrize(("steps", "mu", "wanted"), [(5, 0.0, 5.0), (1, 0.5, 1.0), (2, 0.5, 1.95)])
def test_the_normaliser(steps: int, mu: float, wanted: float) -> None:
    # With mu 0.5 and rate 0.1 each step leaves 0.95 of the one before: 1 + 0.95 = 1.95.
    assert FedNova(mu=mu).normaliser(Fitted({}, steps, 0, 0.0, 0.1)) == pytest.approx(wanted)


def test_the_proximal_term_is_that_of_fedprox() -> None:
    clients = Quadratics({"a": (1.0, 1.0)}, steps=2, rate=0.5)
    state = FedNova().start(clients.layout)
    own = clients.ask(FedNova(mu=1.0), state, "a")
    change = own.tensors["w"] * own.tensors["steps"]
    assert torch.allclose(change, clients.ask(FedProx(mu=1.0), state, "a").tensors["w"])
