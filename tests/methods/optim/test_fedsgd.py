"""FedSGD: a round is one step of gradient descent on the union of the data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedfm.core.client import View
from fedfm.core.jobs import Gradient
from fedfm.core.method import State
from fedfm.core.update import Member, Tensors
from fedfm.federation import Federation
from fedfm.methods.fedavg import FedAvg
from fedfm.methods.optim.fedsgd import FedSGD
from fedfm.rules import Add, Momentum
from fedfm.spaces import LoRA
from fedfm.tasks import Classify
from tests.conftest import FAST, People
from tests.methods.optim.quadratic import Quadratics

Make = Callable[..., Federation]


def gap(left: Tensors, right: Tensors) -> float:
    assert left.keys() == right.keys()
    return max(float((left[n] - right[n]).abs().max()) for n in left)


def unequal() -> Quadratics:
    return Quadratics({"a": (4.0, 0.0), "b": (-1.0, 0.0)}, {"a": 1.0, "b": 3.0}, examples={"b": 3})


def test_a_round_by_hand() -> None:
    # From 1: slopes 1 (1 - 4) = -3 and 3 (1 + 1) = 6; mean (1 * -3 + 3 * 6) / 4 = 3.75; 1 - 0.2 * 3.75 = 0.25.
    clients, method = unequal(), FedSGD(learning_rate=0.2)
    assert clients.run(method, 1, start=(1.0, 0.0)).weights["w"].tolist() == pytest.approx([0.25, 0.0])
    assert [(type(job), getattr(job, "split", "")) for job in clients.jobs] == [(Gradient, "train")] * 2
    update = clients.ask(method, State({"w": torch.tensor([1.0, 0.0])}), "a")
    assert update.tensors["w"].tolist() == [3.0, 0.0]  # what the server adds: against the slope
    assert (update.weight, dict(update.metrics)) == (1, {"loss": 4.5, "examples": 1})


def test_rounds_are_gradient_descent_on_the_mean_loss() -> None:
    # The mean loss has curvature (1 * 1 + 3 * 3) / 4 = 2.5 and is lowest at (4 - 9) / 10, so each round with rate 0.2
    # halves the distance to it.
    found = [float(unequal().run(FedSGD(learning_rate=0.2), t).weights["w"][0]) for t in range(1, 12)]
    assert found == pytest.approx([-0.5 + 0.5 * 0.5**t for t in range(1, 12)], abs=1e-6)


def test_the_mean_gradient_goes_through_the_server_rule() -> None:
    # The mean slope at 0 is (-4 + 9) / 4 = 1.25; at -0.125 it is 2.5 (-0.125 + 0.5) = 0.9375. With momentum 0.5:
    # -0.1 * 1.25 = -0.125, then -0.125 + (-0.0625 - 0.09375) = -0.28125.
    after = unequal().run(FedSGD(learning_rate=0.1), 2, rule=Momentum(beta=0.5))
    assert after.weights["w"].tolist() == pytest.approx([-0.28125, 0.0])
    after = unequal().run(FedSGD(learning_rate=0.1), 1, rule=Add(0.5))
    assert after.weights["w"].tolist() == pytest.approx([-0.0625, 0.0])


def test_one_step_on_the_union_of_the_data(bert_folder: Path) -> None:
    def rows(word: str, label: int, n: int) -> list[dict[str, Any]]:
        return [{"text": f"{word} {i}", "label": (label + i) % 3} for i in range(n)]

    people = People(
        {id: {split: rows(word, len(word), n) for split in ("train", "validation", "test")}
         for id, word, n in (("ann", "ha", 6), ("bob", "no!", 3), ("cid", "m", 4))}
    )  # fmt: skip
    made = Federation(str(bert_folder), FedSGD(learning_rate=0.5), people, Classify(), space=LoRA(r=2), rounds=1)
    pooled = Federation(str(bert_folder), FedAvg(), people.pooled(), Classify(), space=LoRA(r=2), rounds=1)
    found = pooled.trainer.answer(Gradient(made.layout.initial), View(Member("all", 13), 1))
    assert found.examples == 13
    expected = {n: t - 0.5 * found.tensors[n] for n, t in made.layout.initial.items()}
    after = made.run().state.weights
    assert gap(after, expected) < 1e-5
    assert gap(after, made.layout.initial) > 1e-3


def test_fedavg_of_one_full_batch_step_is_the_same(federation: Make) -> None:
    training = replace(
        FAST, max_steps=1, per_device_train_batch_size=6, optim="sgd", learning_rate=0.5, max_grad_norm=0
    )
    one = federation(FedSGD(learning_rate=0.5), training=training).run().state.weights
    other = federation(FedAvg(), training=training).run().state.weights
    assert gap(one, other) < 1e-5
    assert gap(one, federation(FedSGD(learning_rate=0.25)).run().state.weights) > 1e-3


def test_the_rates_of_training_are_not_used(federation: Make) -> None:
    runs = [
        federation(FedSGD(), training=replace(FAST, learning_rate=rate, max_steps=k)) for rate, k in ((1, 1), (9, 3))
    ]
    one, other = (run.run().state.weights for run in runs)
    assert all(torch.equal(one[n], other[n]) for n in one)
