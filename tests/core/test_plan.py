"""Local training: how many steps, and which settings are refused."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from fedfm.core.plan import Training
from fedfm.errors import RecipeError


@pytest.mark.parametrize(
    ("settings", "examples", "steps"),
    [
        ({}, 20, 3),  # ceil(20 / 8) = 3
        ({}, 24, 3),
        ({}, 25, 4),
        ({"num_train_epochs": 2.0}, 20, 6),
        ({"num_train_epochs": 0.5}, 32, 2),  # half of 4
        ({"per_device_train_batch_size": 4}, 20, 5),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, 20, 3),  # ceil(20 / (4 * 2))
        ({"num_train_epochs": 0.01}, 20, 1),  # never none
        ({}, 1, 1),
        ({"max_steps": 7}, 20, 7),
        ({"max_steps": 7, "num_train_epochs": 3.0}, 2, 7),  # max_steps decides
        ({"max_steps": 1}, 10_000, 1),
    ],
)
def test_steps_of_a_client_by_hand(settings: dict[str, Any], examples: int, steps: int) -> None:
    assert Training(**settings).steps(examples) == steps


def test_more_examples_never_mean_fewer_steps() -> None:
    for epochs in (0.3, 1.0, 2.5):
        training = Training(num_train_epochs=epochs, per_device_train_batch_size=3, gradient_accumulation_steps=2)
        counts = [training.steps(n) for n in range(1, 100)]
        assert counts == sorted(counts)
        assert counts[0] >= 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"per_device_train_batch_size": 0}, "training.per_device_train_batch_size must be at least 1, but is 0."),
        ({"per_device_eval_batch_size": -2}, "training.per_device_eval_batch_size must be at least 1, but is -2."),
        ({"gradient_accumulation_steps": 0}, "training.gradient_accumulation_steps must be at least 1, but is 0."),
        (
            {"max_steps": 0},
            "training.max_steps must be at least 1, or -1 to train num_train_epochs; it is 0.",
        ),
        (
            {"max_steps": -5},
            "training.max_steps must be at least 1, or -1 to train num_train_epochs; it is -5.",
        ),
        ({"num_train_epochs": 0.0}, "training.num_train_epochs must be above 0 and finite, but is 0.0."),
        ({"learning_rate": 0.0}, "training.learning_rate must be above 0 and finite, but is 0.0."),
        ({"learning_rate": -1e-4}, "training.learning_rate must be above 0 and finite, but is -0.0001."),
        ({"weight_decay": -0.5}, "training.weight_decay must be at least 0 and finite, but is -0.5."),
        ({"max_grad_norm": -1.0}, "training.max_grad_norm must be at least 0 and finite, but is -1.0."),
        ({"adam_epsilon": -1e-8}, "training.adam_epsilon must be at least 0 and finite, but is -1e-08."),
        ({"adam_beta1": 1.0}, "training.adam_beta1 must be at least 0 and below 1, but is 1.0."),
        ({"adam_beta2": -0.1}, "training.adam_beta2 must be at least 0 and below 1, but is -0.1."),
        (
            {"max_steps": 3, "num_train_epochs": 0.0},  # also where steps decide
            "training.num_train_epochs must be above 0 and finite, but is 0.0.",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Training(**settings)
    assert str(caught.value) == message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name",
    [
        "num_train_epochs",
        "learning_rate",
        "weight_decay",
        "max_grad_norm",
        "adam_epsilon",
        "adam_beta1",
        "adam_beta2",
    ],
)
def test_what_is_not_finite_is_refused(name: str, value: float) -> None:
    with pytest.raises(RecipeError, match=rf"^training\.{name} must be .*, but is {value}\.$"):
        Training(**{name: value})  # type: ignore[arg-type]


def test_the_ends_of_each_range_are_allowed() -> None:
    edge = Training(weight_decay=0.0, max_grad_norm=0.0, adam_epsilon=0.0, adam_beta1=0.0, adam_beta2=0.0)
    assert edge.steps(8) == 1
    assert Training(learning_rate=5e-324, num_train_epochs=5e-324).steps(100) == 1


def test_it_cannot_be_changed_behind_the_back_of_a_run() -> None:
    training = Training()
    with pytest.raises(FrozenInstanceError):
        training.max_steps = 4  # type: ignore[misc]
    assert training.max_steps == -1
