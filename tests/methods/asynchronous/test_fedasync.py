"""FedAsync as a method: the pull towards the received weights, its parts, its settings."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fedfm.core.client import View, work
from fedfm.core.jobs import Fit, Fitted, Job
from fedfm.core.update import Member
from fedfm.errors import RecipeError
from fedfm.federation import Federation
from fedfm.methods.asynchronous.fedasync import FedAsync
from fedfm.methods.fedavg import FedAvg
from fedfm.schedule.mixing import Mixing

Make = Callable[..., Federation]


def test_it_brings_its_schedule(federation: Make) -> None:
    method = FedAsync(alpha=0.9, discount="hinge", slope=2.0, grace=1, concurrency=2, max_staleness=5, sigma=0.1)
    wanted = Mixing(0.9, discount="hinge", slope=2.0, grace=1, concurrency=2, max_staleness=5, sigma=0.1)
    assert federation(method).schedule == wanted


def test_the_pull_by_hand() -> None:
    # rho / 2 |v - w|^2 with v - w = (3, 4) and rho = 0.1 is 1.25; its gradient is 0.1 (3, 4).
    message = {"w": torch.tensor([1.0, 1.0])}

    def answer(job: Job, client: View) -> Fitted:
        assert isinstance(job, Fit)
        (term,) = job.terms
        v = torch.tensor([4.0, 5.0], requires_grad=True)
        loss = term({"w": v}, message)
        loss.backward()
        assert loss.item() == pytest.approx(1.25)
        assert v.grad is not None
        assert v.grad.tolist() == pytest.approx([0.3, 0.4])
        return Fitted({"w": v.detach()}, 1, 1, 0.0)

    update = work(FedAsync(rho=0.1), "local", View(Member("ann", 5), 1), message, answer)
    assert update.tensors["w"].tolist() == [3.0, 4.0]


def test_without_pull_it_is_the_mixing_alone(federation: Make) -> None:
    assert FedAsync(rho=0.0).terms(None, {}) == ()
    one = federation(FedAsync(rho=0.0, sigma=0.3), rounds=3).run()
    other = federation(FedAvg(), schedule=Mixing(sigma=0.3), rounds=3).run()
    assert all(torch.equal(one.state.weights[n], t) for n, t in other.state.weights.items())
    pulled = federation(FedAsync(rho=10.0, sigma=0.3), rounds=3).run()
    assert not all(torch.equal(one.state.weights[n], t) for n, t in pulled.state.weights.items())


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (lambda: FedAsync(rho=-1.0), "FedAsync rho must be at least 0 and finite, but is -1.0."),
        (lambda: FedAsync(alpha=0.0), "Mixing alpha must be above 0 and at most 1, but is 0.0."),
    ],
    ids=["rho", "alpha"],
)
def test_wrong_settings_are_refused_at_once(method: Callable[[], FedAsync], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        method()
    assert str(caught.value) == words
