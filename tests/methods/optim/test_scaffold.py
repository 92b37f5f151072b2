"""SCAFFOLD: gradients corrected by control variates."""

from __future__ import annotations

import pytest
import torch

from fedfm.core.plan import Plan, Training
from fedfm.errors import RecipeError
from fedfm.methods.fedavg import FedAvg
from fedfm.methods.optim.scaffold import Scaffold
from fedfm.sample import Uniform
from tests.conftest import People
from tests.methods.optim.quadratic import Quadratics, apart

SGD = {"optim": "sgd", "max_grad_norm": 0.0, "weight_decay": 0.0}


def test_a_first_round_by_hand() -> None:
    # All controls are 0. a: t = 2, one step of 0.5 from 0 to 1; b: t = -4, to -2. c_k' = (0 - y) / (1 * 0.5): -2 and 4,
    # the gradients at 0. w = mean(1, -2) = -0.5 and c = 0 + (-2 + 4) / 2 = 1.
    clients = Quadratics({"a": (2.0, 0.0), "b": (-4.0, 0.0)}, rate=0.5)
    state = clients.run(Scaffold(), 1)
    assert state.weights["w"].tolist() == pytest.approx([-0.5, 0.0])
    assert state.control["w"].tolist() == pytest.approx([1.0, 0.0])
    assert clients.private["a"]["w"].tolist() == pytest.approx([-2.0, 0.0])
    assert clients.private["b"]["w"].tolist() == pytest.approx([4.0, 0.0])


def test_a_second_task_by_hand() -> None:
    # w = -0.5, c = 1, c_a = -2: the gradient of a at w is -2.5, corrected by -c_a + c: 0.5. A step of 0.5: -0.25.
    clients = Quadratics({"a": (2.0, 0.0), "b": (-4.0, 0.0)}, rate=0.5)
    state = clients.run(Scaffold(), 1)
    update = clients.ask(Scaffold(), state, "a", 2)
    assert update.tensors["w"].tolist() == pytest.approx([-0.25, 0.0])
    # c_a' = c_a - c + (w - y) / (K eta) = -2 - 1 + 0.25 / 0.5 = -2.5, the gradient itself; sent is the change, -0.5.
    assert update.tensors["c:w"].tolist() == pytest.approx([-0.5, 0.0])
    assert clients.private["a"]["w"].tolist() == pytest.approx([-2.5, 0.0])


def test_the_servers_control_is_the_mean_of_the_clients() -> None:
    clients = apart()
    state = clients.run(Scaffold(), 9, cohort=lambda round: ["a", "b"] if round == 1 else ["ab"[round % 2]])
    mean = (clients.private["a"]["w"] + clients.private["b"]["w"]) / 2
    assert torch.allclose(state.control["w"], mean, atol=1e-5)


def test_the_first_round_is_fedavg() -> None:
    runs = [apart().run(method, 1).weights["w"] for method in (Scaffold(), FedAvg())]
    assert torch.allclose(*runs)


def test_it_finds_the_optimum_that_fedavg_misses() -> None:
    clients = apart()
    assert torch.allclose(clients.run(Scaffold(), 100).weights["w"], clients.optimum(), atol=1e-3)
    assert not torch.allclose(apart().run(FedAvg(), 100).weights["w"], clients.optimum(), atol=0.1)


@pytest.mark.parametrize("wrong", [{"optim": "adamw"}, {"max_grad_norm": 1.0}, {"weight_decay": 0.1}])
def test_only_plain_sgd_will_do(wrong: dict[str, object]) -> None:
    def plan(**changes: object) -> Plan:
        return Plan(People({}), Uniform(), Training(**{**SGD, **changes}), 1)

    assert Scaffold().plan(plan()) == plan()
    with pytest.raises(RecipeError, match="scaffold corrects the gradients of plain SGD"):
        Scaffold().plan(plan(**wrong))
