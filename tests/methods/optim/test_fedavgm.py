"""FedAvgM: momentum on the server."""

from __future__ import annotations

import pytest
import torch

from fedfm.errors import RecipeError
from fedfm.methods.fedavg import FedAvg
from fedfm.methods.optim.fedavgm import FedAvgM
from tests.methods.optim.quadratic import Quadratics, apart


def test_two_rounds_by_hand() -> None:
    # One client, t = 1, one step of 0.5. Round 1: change 0.5, v = 0.5, w = 0.5. Round 2: change 0.25,
    # v = 0.9 * 0.5 + 0.25 = 0.7, w = 1.2.
    clients = Quadratics({"a": (1.0, 1.0)}, rate=0.5)
    assert clients.run(FedAvgM(), 2).weights["w"].tolist() == pytest.approx([1.2, 1.2])
    # Nesterov: v = 0.5, w = 0.5 + 0.9 * 0.5 = 0.95; then change 0.025, v = 0.475, w = 0.95 + 0.025 + 0.4275.
    found = Quadratics({"a": (1.0, 1.0)}, rate=0.5).run(FedAvgM(nesterov=True), 2)
    assert found.weights["w"].tolist() == pytest.approx([1.4025, 1.4025])


def test_without_momentum_it_is_fedavg() -> None:
    runs = [apart().run(method, 5).weights["w"] for method in (FedAvgM(beta=0.0), FedAvg())]
    assert torch.allclose(*runs)


def test_agreement_adds_up_and_disagreement_cancels() -> None:
    # The second coordinate of all cohorts agrees, the first does not.
    clients = Quadratics({"a": (1.0, 5.0), "b": (-1.0, 5.0)}, rate=0.01)
    fast = clients.run(FedAvgM(), 20, cohort=lambda round: ["ab"[round % 2]]).weights["w"]
    slow = clients.run(FedAvg(), 20, cohort=lambda round: ["ab"[round % 2]]).weights["w"]
    assert float(fast[1]) > 3 * float(slow[1])
    assert abs(float(fast[0])) < 0.05


@pytest.mark.parametrize("wrong", [{"beta": 1.0}, {"beta": -0.1}, {"learning_rate": 0.0}])
def test_bad_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(RecipeError):
        FedAvgM(**wrong).parts()
