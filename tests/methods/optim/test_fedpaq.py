"""FedPAQ: quantised differences, uniformly averaged."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fedfm.core.update import Kind, Update
from fedfm.errors import RecipeError
from fedfm.federation import Federation
from fedfm.methods.fedavg import FedAvg
from fedfm.methods.optim.fedpaq import FedPAQ
from fedfm.wire import QSGD
from fedfm.wire.stage import Sender
from tests.methods.optim.quadratic import Quadratics


def test_all_clients_count_the_same() -> None:
    # Changes 0.5 and -1.5 for t = 1 and -3: their mean is -0.5, although b has nine times the examples.
    clients = Quadratics({"a": (1.0, 0.0), "b": (-3.0, 0.0)}, examples={"b": 9}, rate=0.5)
    assert clients.run(FedPAQ(), 1).weights["w"].tolist() == pytest.approx([-0.5, 0.0])


def test_it_brings_its_quantiser() -> None:
    assert FedPAQ(levels=5).parts() == {"stages": (QSGD(levels=5),)}
    with pytest.raises(RecipeError):
        FedPAQ(levels=0).parts()


def test_it_sends_a_fraction_and_comes_near_the_exact_run(federation: Callable[..., Federation]) -> None:
    exact, coarse, fine = (federation(m, rounds=3).run() for m in (FedAvg(), FedPAQ(levels=1), FedPAQ(levels=127)))
    sent = [sum(r["bytes_up"] for r in run.records[1:]) for run in (exact, coarse, fine)]
    assert sent[1] < sent[2] < sent[0]

    def gap(run: object) -> float:
        return max(float((t - exact.state.weights[n]).abs().max()) for n, t in run.state.weights.items())

    # Unequal examples make a difference of their own; beside it, fine levels cost little.
    assert gap(fine) < gap(coarse)


def test_the_mean_of_many_quantised_rounds_is_the_exact_change() -> None:
    # Unbiased: the mean of quantised copies of a vector tends to the vector.
    stage, exact = FedPAQ(levels=1).parts()["stages"][0], torch.tensor([0.3, -0.1, 0.7])
    total = torch.zeros(3)
    for i in range(2000):
        sender = Sender(torch.Generator().manual_seed(i), {}, lambda memory: None)
        sent = stage.send(Update({"w": exact}, kind=Kind.DELTA), sender)
        total += stage.receive(sent, {"w": exact}).tensors["w"]
    assert torch.allclose(total / 2000, exact, atol=0.03)
