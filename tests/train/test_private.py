"""Training by DP-SGD: what single examples can do, what noise there is, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedfm.core import trees
from fedfm.core.client import View
from fedfm.core.jobs import Call, Features, Fit, Gradient, Loss, Predict
from fedfm.core.plan import Training
from fedfm.core.terms import Proximal
from fedfm.errors import FedfmError, ModelError
from fedfm.federation import Federation
from fedfm.methods.fedavg import FedAvg
from fedfm.methods.lora.fedit import FedIT
from fedfm.privacy.dp_sgd import DPSGD
from fedfm.spaces import BitFit, Full, FullLoRA, LoRA, Prompt
from fedfm.tasks import Classify
from fedfm.train import Fused, Trainer
from tests.train.test_fused import texts
from tests.train.test_packing import tiny

SGD = Training(
    max_steps=1, per_device_train_batch_size=4, optim="sgd", learning_rate=1.0, weight_decay=0.0, max_grad_norm=0.0
)
QUIET = DPSGD(noise_multiplier=1e-10, max_grad_norm=1e3)
"""So little noise and so high a bound that nothing is left of either."""


def made(privacy: DPSGD | None, space: Any = None, training: Training = SGD, family: str = "bert", **more: Any) -> Any:
    """A federation of clients with 5, 3 and 8 rows of two classes."""
    loaded = tiny(family, "sequence_classification")
    return Federation(
        loaded,
        FedAvg(),
        texts({"a": 5, "b": 3, "c": 8}),
        Classify(),
        space=space or LoRA(r=2, lora_alpha=4),
        training=training,
        privacy=privacy,
        rounds=2,
        **more,
    )


def moved(run: Federation, client: str = "a", **job: Any) -> dict[str, torch.Tensor]:
    """What a client's training changes, from factors of which none is zero."""
    g = torch.Generator().manual_seed(3)
    start = {n: torch.randn(t.shape, generator=g) * 0.1 for n, t in run.layout.initial.items()}
    view = View(run.plan.members.member(client), 1, space=run.layout)
    fitted = run.trainer.answer(Fit(start, **job), view)
    return {n: t - start[n] for n, t in fitted.tensors.items()}


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "space"),
    [
        ("bert", LoRA(r=2, modules_to_save=("classifier",))),
        ("bert", Prompt(num_virtual_tokens=3)),
        ("bert", FullLoRA(r=2)),
        ("llama", LoRA(r=2)),
        ("llama", Full()),
        ("gpt2", LoRA(r=2)),
        ("bert", BitFit()),
    ],
    ids=lambda value: value if isinstance(value, str) else value.id,
)
def test_without_noise_and_bound_it_is_sgd_on_the_batch(family: str, space: Any) -> None:
    # A batch that holds all examples: each is drawn, and with one class an example, their mean is that of the batch.
    training = replace(SGD, per_device_train_batch_size=8)
    close(moved(made(QUIET, space, training, family)), moved(made(None, space, training, family)))


def test_batches_of_several_forwards_are_one_step() -> None:
    one = replace(SGD, per_device_train_batch_size=8)
    several = replace(SGD, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    close(moved(made(QUIET, training=several), "c"), moved(made(None, training=one), "c"))


def test_terms_and_masks_are_as_without_privacy() -> None:
    run, plain = (made(p, training=replace(SGD, per_device_train_batch_size=8, max_steps=2)) for p in (QUIET, None))
    masks = {n: torch.rand(t.shape) < 0.5 for n, t in run.layout.initial.items()}
    center = {n: torch.ones_like(t) for n, t in run.layout.initial.items()}
    job: dict[str, Any] = {"masks": masks, "terms": (Proximal(0.1, center=center),)}
    close(moved(run, **job), moved(plain, **job))
    noisy = moved(made(DPSGD(noise_multiplier=1.0), training=replace(SGD, optim="adamw_torch")), masks=masks)
    assert all(not noisy[n][~mask].any() for n, mask in masks.items())
    assert all(noisy[n][mask].all() for n, mask in masks.items())


def test_one_example_moves_no_more_than_the_bound() -> None:
    training = replace(SGD, per_device_train_batch_size=8)
    for bound in (1e-3, 1e-2):
        privacy = DPSGD(noise_multiplier=1e-9, max_grad_norm=bound)
        change = moved(made(privacy, training=training), "c")
        norm = math.sqrt(sum(float(t.square().sum()) for t in change.values()))
        # Eight examples of the norm C each, divided by eight; they do not all point into one direction.
        assert bound / 8 < norm <= bound * 1.0001
    # What an example more or less does to the sum: at most C. The client says that it has 5 rows, so L = 5.
    rows = texts({"a": 8})
    less = texts({"a": 7})
    assert list(less.rows("a", "train")) == list(rows.rows("a", "train"))[:7]
    privacy = DPSGD(noise_multiplier=1e-9, max_grad_norm=0.05)
    both = []
    for data in (rows, less):
        run = made(privacy, training=training)
        run.trainer.data = data
        both.append(trees.scale(moved(run), 5))  # times L: the sum of the clipped gradients
    norm = math.sqrt(sum(float((both[0][n] - both[1][n]).square().sum()) for n in both[0]))
    assert 0.04 < norm <= 0.05 * 1.0001


def test_noise_has_the_standard_deviation_that_is_said() -> None:
    training = replace(SGD, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    run = made(DPSGD(noise_multiplier=3.0, max_grad_norm=0.5), LoRA(r=32), training)
    first, second = (moved(run, "c", purpose=purpose) for purpose in ("one", "two"))
    still = made(replace(QUIET, max_grad_norm=0.5), LoRA(r=32), training)
    bare = moved(still, "c")
    for change in (first, second):
        noise = torch.cat([(change[n] - bare[n]).flatten() for n in bare])
        assert len(noise) > 4000
        assert float(noise.std()) == pytest.approx(3.0 * 0.5 / 8, rel=0.05)
        assert abs(float(noise.mean())) < 0.01
    assert not torch.equal(first[next(iter(first))], second[next(iter(second))])


def test_who_knows_the_seed_of_the_run_cannot_draw_the_noise_again() -> None:
    changes = [moved(made(DPSGD(1.0), seed=1, secret=secret)) for secret in (1, 1, 2)]
    name = next(iter(changes[0]))
    assert torch.equal(changes[0][name], changes[1][name])
    assert not torch.allclose(changes[0][name], changes[2][name])


def test_examples_are_drawn_one_by_one() -> None:
    """Of eight examples a batch has four on average, sometimes more and sometimes fewer."""
    run = made(QUIET, training=replace(SGD, max_steps=200, learning_rate=1e-9))
    sizes: list[int] = []
    losses = run.trainer.losses

    def noted(examples: Any, *more: Any, **named: Any) -> Any:
        sizes.append(len(examples))
        return losses(examples, *more, **named)

    run.trainer.losses = noted
    moved(run, "c")
    # A batch is computed in forwards of at most four, and an empty one in none, which is left out here.
    assert max(sizes) == 4
    assert sum(sizes) == pytest.approx(200 * 4, rel=0.1)
    assert len({*sizes}) == 4


def test_rows_that_hold_nothing_to_learn_do_not_make_the_others_more_likely() -> None:
    """The account knows rows alone: of eight, each is in a batch of four in half of the steps, were there but three."""
    run = made(QUIET, training=replace(SGD, max_steps=200, learning_rate=1e-9))
    sizes: list[int] = []
    losses, few = run.trainer.losses, run.trainer.encoded("c", "train")[:3]

    def noted(examples: Any, *more: Any, **named: Any) -> Any:
        sizes.append(len(examples))
        return losses(examples, *more, **named)

    run.trainer.losses = noted
    run.trainer._encoded = lambda id, split: few
    moved(run, "c")
    assert sum(sizes) == pytest.approx(200 * 3 / 2, rel=0.12)


def test_a_batch_of_nobody_is_a_step_of_noise() -> None:
    run = made(DPSGD(1.0), training=replace(SGD, per_device_train_batch_size=1, max_steps=30))
    change = moved(run, "c")
    assert all(t.isfinite().all() and t.any() for t in change.values())


def test_nothing_else_may_look_at_training_rows() -> None:
    run = made(DPSGD(1.0))
    view = View(run.plan.members.member("a"), 1, space=run.layout)
    for job in (
        Gradient({}),
        Loss({}, split="train"),
        Predict({}, split="train"),
        Features({}),
        Call(),
        Fit({}, max_steps=1),
        Fit({}, split="train+public"),
    ):
        with pytest.raises(FedfmError, match=f"{type(job).__name__} would look at training rows"):
            run.trainer.answer(job, view)
    assert len(run.trainer.answer(Loss({}, split="test"), view).loss) == 7


def test_no_loss_and_no_number_of_examples_drawn_is_told() -> None:
    run = made(DPSGD(1.0), training=replace(SGD, max_steps=3))
    fitted = run.trainer.answer(Fit({}), View(run.plan.members.member("c"), 1, space=run.layout))
    assert fitted.metrics == {"steps": 3, "examples": 12}


def test_positions_that_all_examples_share_are_refused() -> None:
    with pytest.raises(ModelError, match=r"position_embeddings\.weight cannot be told apart"):
        moved(made(DPSGD(1.0), Full()))


def test_a_layer_that_does_not_do_what_its_kind_does_is_refused() -> None:
    run = made(DPSGD(1.0), LoRA(r=2, modules_to_save=("classifier",)))
    model = run.bench.loaded.model
    [head] = [m for n, m in model.named_modules() if n.endswith("classifier.modules_to_save.default")]
    head.forward = lambda x: torch.nn.functional.linear(x, 2 * head.weight, head.bias)
    with pytest.raises(ModelError, match=r"classifier\.weight cannot be told apart"):
        moved(run)
    assert not any(hasattr(p, "grad_sample") for p in model.parameters())
    assert not any(hasattr(m, "activations") for m in model.modules())
    assert not hasattr(model, "autograd_grad_sample_hooks")


@pytest.mark.parametrize("engine", [Trainer, Fused])
def test_a_run_of_a_language_model(federation: Callable[..., Federation], engine: type[Trainer]) -> None:
    run = federation(FedIT(), privacy=DPSGD(0.5, delta=1e-3), engine=engine)
    outcome = run.run()
    spent = [record["privacy"]["examples"]["epsilon"] for record in outcome.records[1:]]
    assert len(spent) == run.plan.rounds
    assert all(record["train_loss"] is None for record in outcome.records[1:])
    assert 0 < spent[0] < spent[-1] < 100
    whole = federation(FedIT(), engine=engine).run()
    name = next(iter(whole.state.weights))
    assert not torch.equal(whole.state.weights[name], outcome.state.weights[name])


def test_fused_equals_sequential(federation: Callable[..., Federation]) -> None:
    one, many = (federation(FedIT(), privacy=DPSGD(0.5), engine=e).run().state.weights for e in (Trainer, Fused))
    assert all(torch.equal(tensor, many[name]) for name, tensor in one.items())
