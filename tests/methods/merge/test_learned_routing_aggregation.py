"""Learned aggregation: the gradient of the logits, the weights it leads to, equal weights as the start."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fedfm.core.jobs import Gradient, Gradients, Job
from fedfm.core.mean import WeightedMean
from fedfm.core.plan import Training
from fedfm.core.space import Layout
from fedfm.core.update import Member, Tensors, Update
from fedfm.errors import FedfmError, NoUpdates, RecipeError
from fedfm.federation import Federation
from fedfm.methods.fedavg import FedAvg
from fedfm.methods.merge.learned_routing_aggregation import (
    LearnedRoutingAggregation,
    Routed,
    learn,
    modules,
    routed,
)
from fedfm.rules import Add
from tests.conftest import dialogue

Make = Callable[..., Federation]
PUBLIC = [dialogue("ha 1?", "haha!"), dialogue("no 2?", "nonono!"), dialogue("mm 3?", "mm!")]


def updates(**sent: Mapping[str, float]) -> list[Update]:
    return [
        Update({n: torch.tensor(x) for n, x in t.items()}, weight=i + 1, member=k)
        for i, (k, t) in enumerate(sent.items())
    ]


def test_layers_hold_both_factors() -> None:
    names = ["m.0.q.lora_A.weight", "m.0.q.lora_B.weight", "m.0.k.lora_A.weight", "m.0.norm.weight", "m.0.norm.bias"]
    assert modules(names) == {"m.0.q": names[:2], "m.0.k": names[2:3], "m.0.norm": names[3:]}


def test_one_step_by_hand() -> None:
    # One layer, two clients, changes 1 and -1, loss (x - 1)^2 / 2: at the mean 0 the gradient is -1, so <g, D> is -1
    # and 1, their mean 0. ds = a (<g, D> - 0) = -1/2 and 1/2; with rate 1, s = 1/2 and -1/2: a = e / (e + 1) = 0.7311.
    sent = updates(a={"l.weight": 1.0}, b={"l.weight": -1.0})

    def gradient(change: Tensors) -> Tensors:
        return {"l.weight": change["l.weight"] - 1.0}

    routing = learn(sent, gradient, 1, 1.0, WeightedMean())
    assert routing.flatten().tolist() == pytest.approx([0.7311, 0.2689], abs=1e-4)
    assert routed(sent, routing, WeightedMean()).tensors["l.weight"].item() == pytest.approx(0.4621, abs=1e-4)


def test_the_gradient_is_that_of_autograd() -> None:
    g = torch.Generator().manual_seed(0)
    names = ["p.lora_A.weight", "p.lora_B.weight", "q.weight"]
    sent = [
        Update({n: torch.randn(3, generator=g, dtype=torch.float64) for n in names}, member=str(k)) for k in range(4)
    ]
    target = {n: torch.randn(3, generator=g, dtype=torch.float64) for n in names}

    def loss(change: Tensors) -> torch.Tensor:
        return sum(((change[n] - target[n]) ** 4).sum() for n in names)  # type: ignore[return-value]

    def gradient(change: Tensors) -> Tensors:
        free = {n: t.clone().requires_grad_() for n, t in change.items()}
        return dict(zip(names, torch.autograd.grad(loss(free), list(free.values())), strict=True))

    logits = torch.zeros(4, 2, dtype=torch.float64, requires_grad=True)
    layer = {"p.lora_A.weight": 0, "p.lora_B.weight": 0, "q.weight": 1}
    shares = logits.softmax(0)
    mixed = {n: sum(shares[k, layer[n]] * u.tensors[n] for k, u in enumerate(sent)) for n in names}
    (slope,) = torch.autograd.grad(loss(mixed), logits)  # type: ignore[arg-type]
    wanted = (-0.01 * slope).softmax(0)
    assert torch.allclose(learn(sent, gradient, 1, 0.01, WeightedMean()), wanted, atol=1e-9)


def test_equal_weights_are_uniform_fedavg_bit_for_bit(federation: Make) -> None:
    one = federation(FedAvg(weighting="clients")).run()
    other = federation(LearnedRoutingAggregation(steps=0)).run()  # no step, so no public row is needed
    assert all(torch.equal(one.state.weights[n], t) for n, t in other.state.weights.items())


def test_weights_sum_to_one_in_every_layer_and_noise_gets_less_than_its_part(federation: Make) -> None:
    @dataclass(frozen=True)
    class OneIsNoise(LearnedRoutingAggregation):
        def local(self, client: Any, message: Tensors) -> Any:
            update = yield from super().local(client, message)
            if client.member.id == "bob":
                noise = {n: torch.randn(t.shape, generator=client.draw(n)) for n, t in update.tensors.items()}
                return Update(noise, update.weight, update.metrics)
            return update

    training = Training(max_steps=5, per_device_train_batch_size=2, learning_rate=0.1)
    state = federation(OneIsNoise(), rounds=1, public=PUBLIC, training=training).run().state
    assert isinstance(state, Routed)
    assert state.clients == ("ann", "bob", "cid")
    assert len(state.routing) == len({n.partition(".lora_")[0] for n in state.weights}) > 1
    for weights in state.routing.values():
        assert sum(weights) == pytest.approx(1.0)
        assert min(weights) >= 0.0
    bob = [weights[1] for weights in state.routing.values()]
    assert sum(bob) / len(bob) < 1 / 3


def test_noise_gets_less_than_its_part_on_a_quadratic() -> None:
    # Loss |x - t|^2 / 2 in ten dimensions; four clients go most of the way to t, one anywhere of the same length.
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        target = torch.nn.functional.normalize(torch.randn(10, generator=g), dim=0)
        honest = [0.8 * target + 0.1 * torch.randn(10, generator=g) for _ in range(4)]
        noise = torch.nn.functional.normalize(torch.randn(10, generator=g), dim=0)
        sent = [Update({"l.weight": x}, member=str(k)) for k, x in enumerate([*honest, noise])]

        def gradient(change: Tensors, target: torch.Tensor = target) -> Tensors:
            return {"l.weight": change["l.weight"] - target}

        routing = learn(sent, gradient, 5, 10.0, WeightedMean())
        assert routing[4, 0] < 1 / 5
        assert routing.sum().item() == pytest.approx(1.0)


def test_layers_are_routed_apart() -> None:
    # In layer p client a goes the right way, in layer q client b does.
    sent = updates(a={"p.weight": 1.0, "q.weight": -1.0}, b={"p.weight": -1.0, "q.weight": 1.0})
    routing = learn(sent, lambda change: {n: t - 1.0 for n, t in change.items()}, 20, 1.0, WeightedMean())
    assert routing[0, 0] > 0.9
    assert routing[0, 1] < 0.1
    assert routing.sum(0).tolist() == pytest.approx([1.0, 1.0])


@dataclass
class Toy:
    """A server with loss |w - 1|^2 / 2 on its rows."""

    sent: list[Update]
    round: int = 1
    members: tuple[Member, ...] = ()
    jobs: int = 0

    mean = WeightedMean()
    rule = Add(0.5)
    space = Layout({})

    def ask(self, phase: str, messages: Mapping[Member, Tensors]) -> Iterator[Update]:
        yield from self.sent

    def do(self, job: Job) -> Any:
        assert isinstance(job, Gradient)
        assert (job.split, job.train) == ("public", ("*",))
        self.jobs += 1
        return Gradients({n: t - 1.0 for n, t in job.tensors.items()}, 0.0, 1)


def test_a_round_on_the_server() -> None:
    # As in the step by hand, from w = 0; the server rule halves the step: 0.4621 / 2.
    toy = Toy(updates(a={"l.weight": 1.0}, b={"l.weight": -1.0}))
    state = LearnedRoutingAggregation(steps=1, learning_rate=1.0).round(toy, Routed({"l.weight": torch.tensor(0.0)}))
    assert isinstance(state, Routed)
    assert state.weights["l.weight"].item() == pytest.approx(0.2311, abs=1e-4)
    assert state.routing["l"] == pytest.approx((0.7311, 0.2689), abs=1e-4)
    assert toy.jobs == 1
    with pytest.raises(NoUpdates):
        LearnedRoutingAggregation().round(Toy([]), state)


def test_without_public_rows_the_run_says_what_to_do(federation: Make) -> None:
    with pytest.raises(FedfmError, match="there are no public rows"):
        federation(LearnedRoutingAggregation()).run()


def test_it_resumes(federation: Make, tmp_path: Path) -> None:
    def make(rounds: int) -> Federation:
        return federation(LearnedRoutingAggregation(), rounds=rounds, public=PUBLIC)

    whole = make(2).run(tmp_path / "whole")
    make(1).run(tmp_path / "cut")
    (tmp_path / "cut/status.json").unlink()
    resumed = make(2).run(tmp_path / "cut", resume=True)
    assert isinstance(resumed.state, Routed)
    assert all(torch.equal(whole.state.weights[n], t) for n, t in resumed.state.weights.items())
    assert resumed.state.routing == whole.state.routing  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"steps": -1}, "steps must be at least 0, but is -1."),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
    ],
)
def test_bad_settings_are_refused(setting: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        LearnedRoutingAggregation(**setting)
