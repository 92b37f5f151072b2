"""FedAdagrad: the mean change is a gradient to the server's optimizer."""

from __future__ import annotations

import pytest
import torch

from fedfm.errors import RecipeError
from fedfm.methods.fedavg import FedAvg
from fedfm.methods.optim.fedadagrad import FedAdagrad
from tests.methods.optim.quadratic import Quadratics, apart


def test_two_rounds_by_hand() -> None:
    # One client, t = 1, one step of 0.5 each round. Round 1: change 0.5, v = 0.25 and the tau^2 = 1e-6 from the start:
    # 0.1 * 0.5 / (0.5 + 0.001). Round 2 from w: change (1 - w) / 2 = d, v = 0.25 + d^2.
    clients = Quadratics({"a": (1.0, 1.0)}, rate=0.5)
    first = 0.1 * 0.5 / (0.5 + 1e-3)
    d = (1 - first) / 2
    second = first + 0.1 * d / ((0.25 + d * d) ** 0.5 + 1e-3)
    assert clients.run(FedAdagrad(), 1).weights["w"].tolist() == pytest.approx([first, first], abs=1e-5)
    assert clients.run(FedAdagrad(), 2).weights["w"].tolist() == pytest.approx([second, second], abs=1e-5)


def test_the_learning_rate_is_a_factor_on_the_first_step() -> None:
    one, two = (apart().run(FedAdagrad(learning_rate=r), 1).weights["w"] for r in (0.1, 0.2))
    assert torch.allclose(2 * one, two)


def test_it_comes_near_the_point_of_fedavg() -> None:
    # At FedAvg's fixed point the mean change is zero, so no rule moves from there.
    point = apart().run(FedAvg(), 200).weights["w"]
    assert torch.allclose(
        apart().run(FedAdagrad(learning_rate=0.1), 1, start=point.tolist()).weights["w"], point, atol=1e-2
    )
    assert torch.allclose(apart().run(FedAdagrad(learning_rate=0.03), 600).weights["w"], point, atol=0.1)


@pytest.mark.parametrize("wrong", [{"learning_rate": 0.0}, {"tau": 0.0}, {"beta1": 1.0}])
def test_bad_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(RecipeError):
        FedAdagrad(**wrong).parts()
