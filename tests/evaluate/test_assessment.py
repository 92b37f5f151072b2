"""Scores of clients brought together."""

from __future__ import annotations

import json
import math
from typing import Any, cast

import pytest
import torch

from fedfm.core.update import Kind, Tensors, Update
from fedfm.errors import RecipeError
from fedfm.evaluate.assessment import Assessment, Evaluation, assess
from fedfm.tasks.task import Task


class Fake:
    """A task with a mean loss and an accuracy."""

    def metrics(self, tally: Tensors) -> dict[str, float]:
        n = float(tally["examples"])
        return {"loss": float(tally["loss"]) / n, "accuracy": float(tally["hits"]) / n}


TASK = cast(Task, Fake())


def answer(member: str, examples: int, loss: float, hits: int = 0, weight: float | None = None) -> Update:
    tally = {
        "loss": torch.tensor(loss, dtype=torch.float64),
        "hits": torch.tensor(float(hits)),
        "examples": torch.tensor(float(examples)),
    }
    return Update(tally, weight=examples if weight is None else weight, kind=Kind.KNOWLEDGE, member=member)


def scored(*updates: Update) -> Assessment:
    result = assess(TASK, iter(updates))
    assert result is not None
    return result


def test_by_hand() -> None:
    # ann: 2 examples, loss 2 in sum, 2 hits -> 1.0 and 1.0; bob: 8 examples, loss 24, 2 hits -> 3.0 and 0.25.
    # pooled: (2 + 24) / 10 = 2.6 and 4 / 10; mean: (1 + 3) / 2 = 2 and (1 + 0.25) / 2; worst of two clients: 3.
    result = scored(answer("ann", 2, 2.0, 2), answer("bob", 8, 24.0, 2))
    assert result.pooled == pytest.approx({"loss": 2.6, "accuracy": 0.4})
    assert result.mean == pytest.approx({"loss": 2.0, "accuracy": 0.625})
    assert result.worst_decile == pytest.approx(3.0)
    assert result.clients["ann"] == {"loss": 1.0, "accuracy": 1.0}
    assert result.clients["bob"] == {"loss": 3.0, "accuracy": 0.25}
    assert result.examples == {"ann": 2, "bob": 8}


@pytest.mark.parametrize(
    ("clients", "worst"),
    [
        (1, 1.0),
        (2, 2.0),
        (10, 10.0),  # a tenth of ten is one
        (11, (11 + 10) / 2),  # rounded up to two
        (20, (20 + 19) / 2),
        (21, (21 + 20 + 19) / 3),
        (30, (30 + 29 + 28) / 3),
    ],
)
def test_the_worst_decile_by_hand(clients: int, worst: float) -> None:
    # Client i has the loss i, over different numbers of examples; the order in which they answer does not matter.
    updates = [answer(f"c{i}", i % 3 + 1, float(i * (i % 3 + 1))) for i in range(1, clients + 1)]
    assert scored(*updates).worst_decile == pytest.approx(worst)
    assert scored(*updates[::-1]).worst_decile == pytest.approx(worst)


def test_clients_without_examples_do_not_count() -> None:
    result = scored(answer("ann", 2, 2.0), answer("none", 0, 0.0), answer("bob", 2, 6.0))
    assert list(result.clients) == ["ann", "bob"]
    assert result.mean["loss"] == pytest.approx(2.0)


def test_none_when_nobody_has_an_example() -> None:
    assert assess(TASK, []) is None
    assert assess(TASK, iter([answer("ann", 0, 0.0), answer("bob", 0, 0.0)])) is None


def test_one_client_is_pooled_mean_and_worst_at_once() -> None:
    result = scored(answer("ann", 4, 6.0, 1))
    assert result.pooled == result.mean == result.clients["ann"] == {"loss": 1.5, "accuracy": 0.25}
    assert result.worst_decile == 1.5


def test_with_equal_numbers_of_examples_pooled_is_the_mean() -> None:
    for seed in range(10):
        losses = torch.rand(9, generator=torch.Generator().manual_seed(seed)).tolist()
        result = scored(*(answer(f"c{i}", 5, 5 * loss) for i, loss in enumerate(losses)))
        assert result.pooled["loss"] == pytest.approx(result.mean["loss"])
        assert min(losses) <= result.mean["loss"] <= result.worst_decile + 1e-9


def test_the_tallies_are_not_changed() -> None:
    updates = [answer("ann", 2, 2.0, 2), answer("bob", 8, 24.0, 2)]
    scored(*updates)
    assert [{n: t.item() for n, t in u.tensors.items()} for u in updates] == [
        {"loss": 2.0, "hits": 2.0, "examples": 2.0},
        {"loss": 24.0, "hits": 2.0, "examples": 8.0},
    ]


def test_as_json() -> None:
    result = scored(answer("ann", 2, 2.0, 2), answer("bob", 2, 6.0))
    assert json.loads(json.dumps(result.to_json(), allow_nan=False)) == {
        "global": {"loss": 2.0, "accuracy": 0.5},
        "mean": {"loss": 2.0, "accuracy": 0.5},
        "worst_decile": 3.0,
        "clients": {
            "ann": {"loss": 1.0, "accuracy": 1.0, "examples": 2},
            "bob": {"loss": 3.0, "accuracy": 0.0, "examples": 2},
        },
    }


def test_what_is_not_finite_becomes_null() -> None:
    text = json.dumps(scored(answer("ann", 2, float("inf"), 1)).to_json(), allow_nan=False)
    assert json.loads(text) == {
        "global": {"loss": None, "accuracy": 0.5},
        "mean": {"loss": None, "accuracy": 0.5},
        "worst_decile": None,
        "clients": {"ann": {"loss": None, "accuracy": 0.5, "examples": 2}},
    }


@pytest.mark.parametrize("settings", [{"every": -1}, {"max_clients": 0}, {"max_clients": -3}])
def test_settings_that_score_nobody_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as caught:
        Evaluation(**settings)
    values = {"every": 1, "max_clients": 50} | settings
    assert str(caught.value) == (
        "evaluation.every must be at least 0 and evaluation.max_clients at least 1, but they are "
        f"{values['every']} and {values['max_clients']}."
    )


def test_never_and_each_round_are_allowed() -> None:
    assert (Evaluation(every=0).every, Evaluation().every, Evaluation(max_clients=1).max_clients) == (0, 1, 1)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_client_whose_loss_is_no_number_is_among_the_worst_wherever_it_answers(at: int) -> None:
    updates = [answer("ann", 1, 1.0), answer("bob", 1, 3.0)]
    updates.insert(at, answer("nan", 1, float("nan")))
    result = scored(*updates)
    assert math.isnan(result.worst_decile)
    assert result.to_json()["worst_decile"] is None
    assert result.clients["bob"]["loss"] == 3.0


def test_a_loss_that_is_infinite_is_among_the_worst() -> None:
    updates = [answer(f"c{i}", 1, float(i)) for i in range(1, 11)] + [answer("inf", 1, float("inf"))]
    assert scored(*updates).worst_decile == float("inf")
    assert scored(*updates[::-1]).worst_decile == float("inf")
