"""Median and trimmed mean of uploads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from fedfm import parts
from fedfm.core import traits
from fedfm.core.mean import WeightedMean
from fedfm.core.method import Method
from fedfm.core.traits import Trait
from fedfm.core.update import Kind, Update
from fedfm.errors import BadUpdate, Incompatible, NoUpdates, RecipeError
from fedfm.robust import Median, TrimmedMean
from fedfm.wire.topk import TopK


def uploads(n: int, seed: int = 0) -> list[Update]:
    g = torch.Generator().manual_seed(seed)
    return [
        Update(
            {"a": torch.randn(3, 4, generator=g), "b": torch.randn((), generator=g)}, weight=1.0 + k, member=f"c{k:02}"
        )
        for k in range(n)
    ]


def stacked(updates: list[Update], name: str) -> np.ndarray:
    return np.stack([u.tensors[name].numpy() for u in updates])


def test_median_by_hand() -> None:
    # Of 1, 2, 100 the median is 2; of 1, 2, 4, 100 it is (2 + 4) / 2. Weights do not count; they add up.
    values = [([1.0, -9.0], 5.0), ([100.0, 0.0], 1000.0), ([2.0, 7.0], 1.0), ([4.0, 1.0], 2.0)]
    updates = [Update({"w": torch.tensor(v)}, weight=w) for v, w in values]
    assert Median()(updates[:3]).tensors["w"].tolist() == [2.0, 0.0]
    whole = Median()(updates)
    assert whole.tensors["w"].tolist() == [3.0, 0.5]
    assert (whole.weight, whole.kind) == (1008.0, Kind.DELTA)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 11])
def test_median_is_that_of_numpy(n: int) -> None:
    updates = uploads(n, seed=n)
    result = Median()(iter(updates))
    for name in "ab":
        np.testing.assert_allclose(result.tensors[name].numpy(), np.median(stacked(updates, name), axis=0), rtol=1e-6)
    assert result.tensors["a"].shape == (3, 4)
    assert result.tensors["b"].shape == ()


@pytest.mark.parametrize("n", [5, 7, 10])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 0.3, 0.45])
def test_trimmed_mean_is_that_of_scipy(n: int, fraction: float) -> None:
    updates = uploads(n, seed=n)
    result = TrimmedMean(fraction)(updates)
    for name in "ab":
        expected = stats.trim_mean(stacked(updates, name).astype(np.float64), fraction, axis=0)
        np.testing.assert_allclose(result.tensors[name].numpy(), expected, rtol=2e-5, atol=1e-6)


def test_trimmed_mean_by_hand() -> None:
    # Without -50 and 100, the mean of 1, 2, 6 is 3.
    updates = [Update({"w": torch.tensor([v])}, weight=9.0) for v in (1.0, 100.0, 2.0, -50.0, 6.0)]
    assert TrimmedMean(count=1)(updates).tensors["w"].tolist() == [3.0]
    assert TrimmedMean(count=2)(updates).tensors["w"].tolist() == [2.0]
    assert TrimmedMean(fraction=0.2)(updates).tensors["w"].tolist() == [3.0]
    assert TrimmedMean(fraction=0.2)(updates).weight == 45.0


def test_the_ends_of_trimming_are_the_mean_and_the_median() -> None:
    for n in (5, 6):
        updates = [Update(u.tensors, 1.0, member=u.member) for u in uploads(n)]
        mean, median = WeightedMean()(updates), Median()(updates)
        for name in "ab":
            torch.testing.assert_close(TrimmedMean(0.0)(updates).tensors[name], mean.tensors[name])
            most = TrimmedMean(count=(n - 1) // 2)(updates)
            torch.testing.assert_close(most.tensors[name], median.tensors[name])


@pytest.mark.parametrize(("estimator", "hostile"), [(Median(), 4), (TrimmedMean(count=3), 3)])
def test_every_coordinate_lies_among_the_honest_ones(estimator: Any, hostile: int) -> None:
    honest = uploads(9 - hostile)
    values = (1e6, -1e6, 1e5, 7e5)[:hostile]
    bad = [Update({"a": torch.full((3, 4), v), "b": torch.tensor(-v)}, member=f"z{v}") for v in values]
    result = estimator(honest + bad).tensors
    for name in "ab":
        own = torch.from_numpy(stacked(honest, name))
        assert (result[name] >= own.amin(0)).all()
        assert (result[name] <= own.amax(0)).all()
    assert WeightedMean()(honest + bad).tensors["a"].abs().max() > 1e3


@pytest.mark.parametrize("estimator", [Median(), TrimmedMean(0.2)], ids=repr)
def test_the_order_of_clients_changes_no_bit(estimator: Any) -> None:
    updates = uploads(7)
    one, other = estimator(updates), estimator(updates[::-1])
    assert all(torch.equal(one.tensors[n], other.tensors[n]) for n in "ab")


@pytest.mark.parametrize("estimator", [Median(), TrimmedMean(0.2)], ids=repr)
def test_types_stay_and_inputs_too(estimator: Any) -> None:
    tensors = [torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16) * k for k in (1, 2, 4)]
    result = estimator([Update({"w": t}, kind=Kind.WEIGHTS) for t in tensors])
    assert result.tensors["w"].dtype == torch.bfloat16
    assert result.kind is Kind.WEIGHTS
    assert tensors[1].tolist() == [2.0, 4.0, 6.0]


def test_a_median_of_two_huge_values_is_finite() -> None:
    updates = [Update({"w": torch.tensor([3e38])}), Update({"w": torch.tensor([3e38])})]
    assert torch.isfinite(Median()(updates).tensors["w"]).all()


@pytest.mark.parametrize("estimator", [Median(), TrimmedMean()], ids=repr)
def test_nothing_and_unlike_uploads(estimator: Any) -> None:
    with pytest.raises(NoUpdates, match="nobody's update could be used"):
        estimator(iter([]))
    with pytest.raises(BadUpdate, match="'eve' sent other names or shapes"):
        estimator([Update({"w": torch.ones(2)}), Update({"w": torch.ones(3)}, member="eve")])


def test_trimming_all_that_came_is_refused() -> None:
    with pytest.raises(RecipeError) as caught:
        TrimmedMean(count=2)(uploads(4))
    assert str(caught.value) == (
        "TrimmedMean count 2 leaves none of 4 uploads: 4 would be left out. Lower count, or let the sampler draw at "
        "least 5 clients."
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrimmedMean(0.5), "TrimmedMean fraction must be at least 0 and below 0.5, but is 0.5."),
        (lambda: TrimmedMean(float("nan")), "TrimmedMean fraction must be at least 0 and below 0.5, but is nan."),
        (lambda: TrimmedMean(count=-1), "TrimmedMean count must be at least 1, or 0 to use fraction; it is -1."),
    ],
)
def test_a_useless_setting_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make()
    assert str(caught.value) == message


def test_composition() -> None:
    after = traits.check(Method(), [Median()])[-1].after
    assert Trait.LINEAR not in after
    with pytest.raises(Incompatible, match=r"Median needs DENSE .* which TopK takes away"):
        traits.check(Method(), [TopK(), Median()])


@pytest.mark.parametrize(("kind", "cls"), [("median", Median), ("trimmed-mean", TrimmedMean)])
def test_a_recipe_names_it(kind: str, cls: type) -> None:
    assert parts.make("robust", kind, "mean") == cls()
    assert parts.find("robust", kind, "mean").paper.arxiv == "1803.01498"  # type: ignore[attr-defined]
