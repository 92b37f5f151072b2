"""Biases alone, without and with noise on single examples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedfm.core import trees
from fedfm.core.jobs import Fit
from fedfm.errors import ModelError
from fedfm.evaluate import Evaluation
from fedfm.federation import Federation
from fedfm.models import load
from fedfm.privacy.dp_sgd import DPSGD
from fedfm.spaces import BitFit
from fedfm.tasks.task import collate
from fedfm.train import Fused, Trainer, private
from tests.train.test_packing import tiny
from tests.train.test_private import SGD, made


def run(privacy: DPSGD | None = None, **more: Any) -> Federation:
    settings = {"training": replace(SGD, learning_rate=0.1, max_steps=2), "evaluation": Evaluation(every=0), **more}
    return made(privacy, BitFit(), **settings)


def test_biases_and_the_head_are_tuned() -> None:
    loaded = tiny("bert", "sequence_classification")
    space = BitFit().attach(loaded, 0)
    everything = dict(loaded.model.named_parameters())
    assert {"classifier.weight", "classifier.bias"} < set(space.parameters)
    assert set(space.parameters) - {"classifier.weight"} == {n for n in everything if n.endswith(".bias")}
    assert trees.count(space.initial) < sum(p.numel() for p in everything.values()) / 10
    assert all(space.parameters[n] is everything[n] for n in space.parameters)


def test_only_what_is_tuned_changes_and_travels() -> None:
    federation = run()
    before = trees.clone(dict(federation.bench.loaded.model.named_parameters()))
    outcome = federation.run()
    names = set(federation.bench.space.initial)
    assert set(outcome.state.weights) == names
    federation.bench.space.load(outcome.state.weights)
    for name, tensor in federation.bench.loaded.model.named_parameters():
        assert torch.equal(tensor, before[name]) == (name not in names), name
    header = 4000  # names and metrics of an upload
    sent = outcome.records[1]["bytes_up"] / 3
    assert trees.nbytes(outcome.state.weights) <= sent < trees.nbytes(outcome.state.weights) + header


def test_gradients_of_single_examples_are_those_of_autograd() -> None:
    federation = run(DPSGD(1.0))
    trainer, space = federation.trainer, federation.bench.space
    examples = trainer.encoded("c", "train")
    space.load({})
    chosen = space.train_only(("*",))
    trainer.mode(training=True)
    each = []
    for example in examples:
        losses = trainer.losses([example], collate([example], trainer.pad))
        each.append(torch.autograd.grad((losses.total / losses.count).sum(), list(chosen.values())))
    with private._per_example(space.model, chosen, rowwise=True):
        private._gradients(trainer, Fit({}), examples, torch.arange(len(examples)), chosen)
        for at, (name, p) in enumerate(chosen.items()):
            found, wanted = p.grad_sample, torch.stack([g[at] for g in each])  # type: ignore[attr-defined]
            assert found.shape == (len(examples), *p.shape)
            assert torch.allclose(found, wanted, atol=1e-5), name
    assert any(name.endswith("LayerNorm.bias") for name in chosen)


def test_clipping_and_noise_are_those_of_dp_sgd() -> None:
    quiet = run(DPSGD(1e-10, max_grad_norm=1e-3), training=replace(SGD, per_device_train_batch_size=8))
    outcome = quiet.run()
    change = trees.subtract(outcome.state.weights, quiet.bench.space.initial)
    assert 0 < trees.norm(change) <= 2 * 1e-3 * 1.001  # two rounds of one step, each of mean norm C at most
    noisy = run(DPSGD(1.0, delta=1e-3)).run()
    assert noisy.records[-1]["privacy"]["examples"]["epsilon"] > 0
    assert all(t.isfinite().all() for t in noisy.state.weights.values())


def test_fused_equals_sequential() -> None:
    one, other = (run(engine=engine).run().state.weights for engine in (Trainer, Fused))
    assert all(torch.allclose(t, other[n], atol=1e-5) for n, t in one.items())


def test_the_saved_folder_is_the_model(tmp_path: Path) -> None:
    federation = run()
    outcome = federation.run(tmp_path / "run")
    again = load(str(tmp_path / "run/final"), head="sequence_classification")
    found = dict(again.model.named_parameters())
    assert all(torch.equal(found[n], t) for n, t in outcome.state.weights.items())


def test_a_model_without_biases_is_refused() -> None:
    with pytest.raises(ModelError, match=r"have no biases to tune\. Choose the space lora"):
        BitFit().attach(tiny("llama", "sequence_classification"), 0)
