"""What a server believes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedfm.core.update import Kind, Tensors, Update
from fedfm.errors import BadUpdate
from fedfm.wire import codec
from fedfm.wire.admit import Limits, admit

EXPECTED = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}


def good(**changes: Any) -> Update:
    tensors: Tensors = {"a": torch.ones(2, 3), "b": torch.ones(4)}
    return Update(**({"tensors": tensors, "weight": 3.0, "member": "ann"} | changes))


def reason(
    update: Update, expected: Tensors | None = EXPECTED, limits: Limits | None = None, kind: Kind = Kind.DELTA
) -> str:
    with pytest.raises(BadUpdate) as caught:
        admit(update, kind, expected, limits or Limits())
    return str(caught.value)


def with_b(values: Any) -> Update:
    return good(tensors={"a": torch.ones(2, 3), "b": values})


@pytest.mark.parametrize(
    "update",
    [
        good(),
        good(tensors={"b": torch.zeros(4), "a": torch.zeros(2, 3)}),  # in any order; zeros are fine
        with_b(torch.ones(4, dtype=torch.bfloat16)),
        with_b(torch.ones(4, dtype=torch.float64)),
        with_b(torch.ones(4).to(torch.float8_e4m3fn)),
        good(weight=1e9),
        good(weight=1e-12),
        good(kind=Kind.WEIGHTS),
    ],
    ids=range(8),
)
def test_a_good_update_passes_and_stays_as_it_is(update: Update) -> None:
    before = {name: (tensor, tensor.double().tolist()) for name, tensor in update.tensors.items()}
    admit(update, update.kind, EXPECTED, Limits())
    assert {n: (t, t.double().tolist()) for n, t in update.tensors.items()} == before


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_not_finite_is_refused_by_name(bad: float, dtype: torch.dtype) -> None:
    values = torch.ones(4, dtype=dtype)
    values[2] = bad
    assert reason(with_b(values)) == "tensor 'b' is not finite"
    assert reason(with_b(values), expected=None) == "tensor 'b' is not finite"


def test_the_tensor_at_fault_is_named_among_good_and_empty_ones() -> None:
    tensors = {f"t{i}": torch.ones(3) for i in range(5)} | {"empty": torch.zeros(0), "bad": torch.tensor(float("nan"))}
    assert reason(good(tensors={"ids": torch.tensor([1, 2])} | tensors), expected=None) == "tensor 'bad' is not finite"


def test_a_norm_above_the_limit_is_refused() -> None:
    # The norm of [3, 4, 0, 0] is 5.
    values = torch.tensor([3.0, 4.0, 0.0, 0.0])
    admit(with_b(values), Kind.DELTA, EXPECTED, Limits(max_norm=5.0))
    assert reason(with_b(values), limits=Limits(max_norm=4.99)) == "tensor 'b' has a norm above 4.99"


def test_the_default_norm_limit() -> None:
    admit(with_b(torch.tensor([9e5, 0.0, 0.0, 0.0])), Kind.DELTA, EXPECTED, Limits())
    assert reason(with_b(torch.tensor([0.0, 2e6, 0.0, 0.0]))) == "tensor 'b' has a norm above 1e+06"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_norm_beyond_float32_is_too_large_and_not_called_infinite(dtype: torch.dtype) -> None:
    assert reason(with_b(torch.full((4,), 1e30, dtype=dtype))) == "tensor 'b' has a norm above 1e+06"


def test_missing_extra_and_misshapen_tensors_are_named() -> None:
    assert reason(good(tensors={"a": torch.ones(2, 3)})) == "tensor 'b' is missing (1 in all)"
    assert reason(good(tensors={})) == "tensor 'a' is missing (2 in all)"
    extra = {"a": torch.ones(2, 3), "b": torch.ones(4), "spy": torch.ones(1), "spy2": torch.ones(1)}
    assert reason(good(tensors=extra)) == "tensor 'spy' was not asked for (2 in all)"
    assert reason(with_b(torch.ones(5))) == "tensor 'b' has shape [5], not [4]"
    assert reason(with_b(torch.ones(4, 1))) == "tensor 'b' has shape [4, 1], not [4]"
    assert reason(with_b(torch.tensor(1.0))) == "tensor 'b' has shape [], not [4]"
    assert (
        reason(good(tensors={"a": torch.ones(3, 2), "b": torch.ones(4)})) == "tensor 'a' has shape [3, 2], not [2, 3]"
    )


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64])
def test_other_than_floating_point_is_refused_where_weights_are_expected(dtype: torch.dtype) -> None:
    message = f"tensor 'b' holds {dtype}, not floating-point numbers"
    assert reason(with_b(torch.ones(4, dtype=dtype))) == message


def test_without_expectations_names_shapes_and_integers_are_free() -> None:
    update = good(tensors={"ids": torch.tensor([5, 6]), "any": torch.ones(7)})
    before = update.tensors["ids"].tolist()
    admit(update, Kind.DELTA, None, Limits())
    assert update.tensors["ids"].tolist() == before
    assert reason(update).startswith("tensor 'a' is missing")


@pytest.mark.parametrize("weight", [0.0, -0.0, -1.0, float("nan"), float("inf"), float("-inf"), 1.1e9])
def test_weights_that_no_client_can_have_are_refused(weight: float) -> None:
    assert reason(good(weight=weight)) == f"its weight {weight} is not above 0 and at most 1e+09"


def test_the_weight_limit() -> None:
    admit(good(weight=100.0), Kind.DELTA, EXPECTED, Limits(max_weight=100.0))
    assert (
        reason(good(weight=100.5), limits=Limits(max_weight=100.0)) == "its weight 100.5 is not above 0 and at most 100"
    )


def test_knowledge_may_weigh_nothing_but_not_less() -> None:
    tally = Update({"loss": torch.tensor(0.0)}, weight=0.0, kind=Kind.KNOWLEDGE)
    admit(tally, Kind.KNOWLEDGE, None, Limits())
    for weight in (-1.0, float("nan"), 2e9):
        update = Update({}, weight=weight, kind=Kind.KNOWLEDGE)
        message = f"its weight {weight} is not at least 0 and at most 1e+09"
        assert reason(update, expected=None, kind=Kind.KNOWLEDGE) == message
    assert "its weight 0.0 is not above 0" in reason(Update({}, weight=0.0), expected=None)


@pytest.mark.parametrize("asked", list(Kind))
@pytest.mark.parametrize("sent", list(Kind))
def test_the_sender_does_not_choose_by_which_rules_it_is_judged(asked: Kind, sent: Kind) -> None:
    update = good(kind=sent)
    if asked is sent:
        admit(update, asked, EXPECTED, Limits())
        return
    for expected in (EXPECTED, None):
        assert reason(update, expected, kind=asked) == f"it holds {sent.value}, not {asked.value}"
    # Calling itself knowledge does not buy the right to weigh nothing.
    assert "it holds" in reason(good(kind=sent, weight=0.0), kind=asked)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_metric_that_is_not_finite_is_refused_by_name(value: float) -> None:
    update = good(metrics={"steps": 3, "loss": value})
    assert reason(update) == "its metric 'loss' is not finite"
    assert reason(update, expected=None) == "its metric 'loss' is not finite"


def test_an_oversize_update_is_refused_by_its_encoded_size() -> None:
    update = good()
    size = len(codec.encode(update))
    admit(update, Kind.DELTA, EXPECTED, Limits(max_upload_bytes=size))
    message = f"{size} bytes are more than the {size - 1} allowed"
    assert reason(update, limits=Limits(max_upload_bytes=size - 1)) == message


def test_metrics_count_towards_the_size() -> None:
    limits = Limits(max_upload_bytes=len(codec.encode(good())))
    assert "bytes are more than" in reason(good(metrics={"x": 1.0}), limits=limits)


def test_an_update_with_no_tensors_passes_when_none_are_expected() -> None:
    admit(good(tensors={}), Kind.DELTA, {}, Limits())
    assert reason(good(), expected={}) == "tensor 'a' was not asked for (2 in all)"
