"""FFA-LoRA: A as it was drawn, B averaged, so that averaging is exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedfm.core import trees
from fedfm.core.client import View, work
from fedfm.core.jobs import Fitted, Job, Loss
from fedfm.core.mean import WeightedMean
from fedfm.core.method import State
from fedfm.core.space import Layout
from fedfm.core.update import Update
from fedfm.federation import Federation
from fedfm.methods.lora import product
from fedfm.methods.lora.fedit import FedIT
from fedfm.methods.lora.ffa_lora import FFALoRA
from fedfm.rules import Add
from fedfm.spaces import LoRA
from fedfm.wire.clip import Clip
from fedfm.wire.gaussian import Gaussian

Make = Callable[..., Federation]
A, B = "x.lora_A.weight", "x.lora_B.weight"
LAYOUT = Layout({A: torch.tensor([[1.0, 2.0]]), B: torch.zeros(2, 1)})


def test_the_product_of_the_mean_is_the_mean_of_the_products_by_hand() -> None:
    # A = [1 2], B = 0. Clients of weight 1 and 3 move B to [4, 0] and [0, 8]: the mean is [1, 6], the product
    # [1 2; 6 12], which is 1/4 [4 8; 0 0] + 3/4 [0 0; 8 16].
    method = FFALoRA()
    state = method.start(LAYOUT)
    assert list(state.weights) == [B]
    sent = [Update({B: torch.tensor([[4.0], [0.0]])}, 1), Update({B: torch.tensor([[0.0], [8.0]])}, 3)]
    state = method.apply(state, method.combine(state, sent, WeightedMean()), Add())
    assert (state.weights[B] @ LAYOUT.initial[A]).tolist() == [[1.0, 2.0], [6.0, 12.0]]


def test_the_run_s_product_is_the_mean_of_the_clients_products(
    federation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, sent = federation(FFALoRA(), rounds=1), list[Update]()
    combine = FFALoRA.combine

    def noted(self: FFALoRA, state: State, updates: Any, mean: Any) -> Update:
        sent.extend(updates := list(updates))
        return combine(self, state, updates, mean)

    monkeypatch.setattr(FFALoRA, "combine", noted)
    outcome = run.run()
    initial = run.layout.initial
    after = product.pairs({**initial, **run.result(outcome.state)})
    parts = [(u.weight / 13, product.pairs({**initial, **trees.add(run.start().weights, u.tensors)})) for u in sent]
    assert [p for p, _ in parts] == [6 / 13, 3 / 13, 4 / 13]
    for stem, (a, b) in after.items():
        mean = sum(p * (pairs[stem].b @ pairs[stem].a) for p, pairs in parts)
        assert (b @ a).abs().max() > 1e-3
        assert torch.allclose(b @ a, mean, atol=1e-6)  # type: ignore[arg-type]


def test_a_never_changes_and_never_travels(federation: Make) -> None:
    run = federation(FFALoRA())
    state, initial = run.run().state, run.layout.initial
    fitted: list[Fitted] = []

    def answer(job: Job, client: View) -> Any:
        fitted.append(run.trainer.answer(job, client))
        return fitted[-1]

    for member in map(run.plan.members.member, run.ids):
        message = run.method.message(state, member)
        client = View(member, 3, space=run.layout)
        update = work(run.method, "local", client, message, answer)
        assert set(update.tensors) == set(message) == set(trees.select(initial, ("lora_B",)))
        assert client.kept is None
    assert len(fitted) == 3
    for name, tensor in initial.items():
        assert all(torch.equal(f.tensors[name], tensor) == ("lora_A" in name) for f in fitted)


def test_half_the_bytes_on_square_layers(federation: Make) -> None:
    square = LoRA(r=2, lora_alpha=4, target_modules=("q_proj",))
    half, whole = (federation(m, space=square, rounds=1).run().records for m in (FFALoRA(), FedIT()))
    assert half[0]["shared_parameters"] * 2 == whole[0]["shared_parameters"]
    # What FedIT sends besides is A of two layers, 2 x 32 numbers of 4 bytes each, for three clients, and its names.
    assert whole[1]["bytes_up"] - half[1]["bytes_up"] >= 3 * 2 * 2 * 32 * 4
    ours, theirs = (federation(m, space=square) for m in (FFALoRA(), FedIT()))
    assert trees.nbytes(ours.start().weights) * 2 == trees.nbytes(theirs.start().weights) == 2 * 2 * 2 * 32 * 4


def test_noise_enters_the_product_linearly(federation: Make) -> None:
    # With noise z N on the mean of B, the product moves by z N A: equal steps of z are equal steps of the product.
    def products(z: float) -> list[torch.Tensor]:
        run = federation(FFALoRA(), rounds=1, stages=(Clip(1.0), Gaussian(z, delta=0.1)))
        state = run.run().state
        return [b @ a for a, b in product.pairs({**run.layout.initial, **run.result(state)}).values()]

    for one, two, three in zip(*map(products, (1.0, 2.0, 3.0)), strict=True):
        assert (two - one).norm() > 0.1
        assert torch.allclose(three - two, two - one, atol=1e-5)


def test_scores_are_those_of_the_global_model_and_get_better(federation: Make) -> None:
    run = federation(FFALoRA(), rounds=4)
    outcome = run.run()
    losses = [record["validation"]["global"]["loss"] for record in outcome.records]
    assert losses[-1] < losses[0]
    for id, scores in outcome.records[-1]["validation"]["clients"].items():
        client = View(run.plan.members.member(id), 0)
        one = run.trainer.answer(Loss(run.result(outcome.state), split="validation"), client)
        assert float(one.loss.sum() / one.count.sum()) == pytest.approx(scores["loss"], rel=1e-5)


@pytest.mark.parametrize("head", ["classifier", "classifier.out_proj", "score", "pre_classifier"])
def test_all_of_a_new_head_is_trained_and_averaged(head: str) -> None:
    # As they are called in BERT, RoBERTa, Llama and DistilBERT, the last of which has a classifier besides.
    tensors = {**LAYOUT.initial, f"base_model.model.{head}.weight": torch.zeros(1)}
    assert list(trees.select(tensors, FFALoRA.train)) == [B, f"base_model.model.{head}.weight"]
    assert FFALoRA.share == FFALoRA.train
