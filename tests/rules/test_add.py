"""Plain addition on the server."""

from __future__ import annotations

import pytest
import torch

from fedfm.core.method import Method, State
from fedfm.core.update import Update
from fedfm.errors import RecipeError
from fedfm.rules.add import Add


def test_by_hand() -> None:
    # [1, 2] + 0.5 * [4, -2] = [3, 1]; what did not travel stays.
    weights = {"w": torch.tensor([1.0, 2.0]), "still": torch.tensor(5.0)}
    new, memory = Add(0.5)(weights, {"w": torch.tensor([4.0, -2.0])}, {"m": 1})
    assert new["w"].tolist() == [3.0, 1.0]
    assert new["still"].item() == 5.0
    assert memory == {"m": 1}


def test_with_rate_one_the_new_weights_are_the_mean_of_the_clients() -> None:
    start, ends = torch.tensor([1.0, 1.0]), [torch.tensor([3.0, 0.0]), torch.tensor([5.0, 4.0])]
    delta = sum(end - start for end in ends) / 2
    new, _ = Add()({"w": start}, {"w": delta}, {})
    assert new["w"].tolist() == [4.0, 2.0]


def test_nothing_is_changed_in_place() -> None:
    weights, delta = {"w": torch.ones(2)}, {"w": torch.ones(2)}
    new, _ = Add(3.0)(weights, delta, {})
    assert weights["w"].tolist() == delta["w"].tolist() == [1.0, 1.0]
    assert new["w"].tolist() == [4.0, 4.0]


def test_a_zero_change_changes_nothing_bit_for_bit() -> None:
    weights = torch.randn(50, generator=torch.Generator().manual_seed(0))
    new, _ = Add(0.7)({"w": weights}, {"w": torch.zeros(50)}, {})
    assert torch.equal(new["w"], weights)


def test_the_default_apply_of_a_method_uses_it() -> None:
    state = State({"w": torch.tensor([1.0])}, {"kept": 2})
    after = Method().apply(state, Update({"w": torch.tensor([0.5])}), Add(2.0))
    assert after.weights["w"].tolist() == [2.0]
    assert after.memory == {"kept": 2}
    assert state.weights["w"].tolist() == [1.0]


def test_a_change_of_unknown_names_is_refused() -> None:
    with pytest.raises(KeyError, match="such as 'x'"):
        Add()({"w": torch.ones(1)}, {"x": torch.ones(1)}, {})


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf"), float("-inf")])
def test_a_rate_that_learns_nothing_or_too_much_is_refused(rate: float) -> None:
    with pytest.raises(RecipeError) as caught:
        Add(rate)
    assert str(caught.value) == f"rule.learning_rate must be above 0 and finite, but is {rate}."
