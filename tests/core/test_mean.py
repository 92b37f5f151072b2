"""The weighted mean of a stream of updates."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch

from fedfm.core.mean import WeightedMean
from fedfm.core.update import Kind, Update
from fedfm.errors import BadUpdate, NoUpdates

mean = WeightedMean()


def cohort(seed: int, clients: int = 7) -> list[Update]:
    g = torch.Generator().manual_seed(seed)
    return [
        Update(
            {"a": torch.randn(3, 2, generator=g), "b": torch.randn(5, generator=g)},
            weight=float(torch.randint(1, 50, (), generator=g)),
            member=f"c{i}",
        )
        for i in range(clients)
    ]


def test_by_hand() -> None:
    # (1 * [1, 2] + 3 * [5, -2]) / 4 = [16 / 4, -4 / 4] = [4, -1]
    result = mean(
        [
            Update({"w": torch.tensor([1.0, 2.0])}, weight=1, member="a"),
            Update({"w": torch.tensor([5.0, -2.0])}, weight=3, member="b"),
        ]
    )
    assert result.tensors["w"].tolist() == [4.0, -1.0]
    assert result.weight == 4.0
    assert result.member == "mean"
    assert dict(result.metrics) == {}


def test_three_by_hand() -> None:
    # (2 * 6 + 1 * 0 + 5 * (-4)) / 8 = -8 / 8 = -1
    updates = [Update({"w": torch.tensor(x)}, weight=n) for x, n in ((6.0, 2), (0.0, 1), (-4.0, 5))]
    assert mean(updates).tensors["w"].item() == pytest.approx(-1.0, abs=1e-6)


def test_equals_the_formula() -> None:
    for seed in range(10):
        updates = cohort(seed)
        total = sum(u.weight for u in updates)
        result = mean(iter(updates))
        assert result.weight == pytest.approx(total)
        for name in ("a", "b"):
            direct = sum(u.tensors[name].double() * (u.weight / total) for u in updates)
            torch.testing.assert_close(result.tensors[name].double(), direct, atol=1e-6, rtol=0)


def test_order_does_not_matter() -> None:
    for seed in range(10):
        updates = cohort(seed)
        order = torch.randperm(len(updates), generator=torch.Generator().manual_seed(seed)).tolist()
        one, other = mean(updates), mean([updates[i] for i in order])
        for name in ("a", "b"):
            torch.testing.assert_close(one.tensors[name], other.tensors[name], atol=1e-6, rtol=0)


def test_a_weight_of_two_is_the_update_twice() -> None:
    one, other = {"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 3.0])}
    heavy = mean([Update(one, weight=2), Update(other, weight=1)])
    twice = mean([Update(one), Update(one), Update(other)])
    torch.testing.assert_close(heavy.tensors["w"], twice.tensors["w"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_mean_of_one_update_is_that_update_bit_for_bit(dtype: torch.dtype) -> None:
    for seed in range(5):
        tensor = torch.randn(50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
        result = mean([Update({"w": tensor}, weight=17.3)])
        assert result.tensors["w"].dtype == dtype
        assert torch.equal(result.tensors["w"], tensor)


def test_the_mean_of_equal_updates_is_that_update_bit_for_bit() -> None:
    tensor = torch.randn(50, generator=torch.Generator().manual_seed(0))
    result = mean([Update({"w": tensor.clone()}, weight=w) for w in (3.0, 1.0, 7.0)])
    assert torch.equal(result.tensors["w"], tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("clients", [1, 3])
def test_the_inputs_are_neither_changed_nor_shared(clients: int, dtype: torch.dtype) -> None:
    tensors = [torch.full((4,), float(i), dtype=dtype) for i in range(clients)]
    result = mean([Update({"w": t}, weight=i + 1) for i, t in enumerate(tensors)])
    result.tensors["w"].fill_(99.0)
    assert [t.tolist() for t in tensors] == [[float(i)] * 4 for i in range(clients)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_tensors_are_accumulated_in_float32(dtype: torch.dtype) -> None:
    # One client at 1 and 4095 at 1 + 2^-7 (both exact in bfloat16): the mean is 1.00781 and rounds to 1 + 2^-7. A
    # running mean kept in bfloat16 would never leave 1: each step moves it by less than half of its last bit.
    near = 1.0 + 2.0**-7
    updates = (Update({"w": torch.tensor([1.0 if i == 0 else near], dtype=dtype)}) for i in range(4096))
    result = mean(updates)
    assert result.tensors["w"].dtype == dtype
    assert result.tensors["w"].item() == pytest.approx(near, abs=0 if dtype is torch.bfloat16 else 2.0**-10)


def test_large_float16_values_do_not_overflow_on_the_way() -> None:
    # The sum of the two is 120000, beyond float16's 65504; their mean is not.
    result = mean([Update({"w": torch.tensor([60000.0], dtype=torch.float16)}) for _ in range(2)])
    assert result.tensors["w"].tolist() == [60000.0]


def test_float64_stays_float64() -> None:
    tiny = 1e-12
    values = (1.0, 1.0 + 2 * tiny)
    result = mean([Update({"w": torch.tensor([x], dtype=torch.float64)}) for x in values])
    assert result.tensors["w"].item() - 1.0 == pytest.approx(tiny, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_each_update_is_let_go_before_the_next_is_asked_for(dtype: torch.dtype) -> None:
    seen: list[weakref.ref[torch.Tensor]] = []

    def stream() -> Iterator[Update]:
        for i in range(7):
            gc.collect()
            alive = [j for j, ref in enumerate(seen) if ref() is not None]
            assert alive == [], f"when update {i} was asked for, {alive} were still alive"
            tensor = torch.full((10,), float(i), dtype=dtype)
            seen.append(weakref.ref(tensor))
            box = [Update({"w": tensor})]
            del tensor
            yield box.pop()  # no name here holds it any longer

    # (0 + 1 + ... + 6) / 7 = 3
    assert mean(stream()).tensors["w"].tolist() == pytest.approx([3] * 10)
    gc.collect()
    assert not any(ref() is not None for ref in seen)


def test_the_stream_is_read_once() -> None:
    class Once:
        def __init__(self) -> None:
            self.opened = 0

        def __iter__(self) -> Iterator[Update]:
            self.opened += 1
            return iter(cohort(0))

    once = Once()
    assert mean(once).weight > 0
    assert once.opened == 1


def test_nobody() -> None:
    with pytest.raises(NoUpdates, match="nobody's update could be used"):
        mean([])
    with pytest.raises(NoUpdates):
        mean(iter(()))


@pytest.mark.parametrize("names", [("a",), ("a", "b", "c"), ("a", "x"), ()])
def test_other_names_are_refused_and_their_sender_is_named(names: tuple[str, ...]) -> None:
    first = Update({"a": torch.ones(1), "b": torch.ones(1)}, member="ann")
    second = Update({n: torch.ones(1) for n in names}, member="bob")
    with pytest.raises(BadUpdate, match="'bob' sent other names or shapes than the clients before it"):
        mean([first, second])


def test_the_order_of_names_does_not_matter() -> None:
    first = Update({"a": torch.tensor(1.0), "b": torch.tensor(2.0)})
    second = Update({"b": torch.tensor(4.0), "a": torch.tensor(3.0)})
    result = mean([first, second])
    assert {n: t.item() for n, t in result.tensors.items()} == {"a": 2.0, "b": 3.0}


@pytest.mark.parametrize("kind", list(Kind))
def test_the_kind_is_that_of_the_updates(kind: Kind) -> None:
    assert mean([Update({"a": torch.ones(1)}, kind=kind) for _ in range(2)]).kind is kind


def test_updates_without_tensors_still_count() -> None:
    result = mean([Update({}, weight=2), Update({}, weight=3)])
    assert result.tensors == {}
    assert result.weight == 5


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 1), ()])
def test_other_shapes_are_refused_even_those_that_would_broadcast(shape: tuple[int, ...]) -> None:
    first = Update({"a": torch.ones(2)}, member="ann")
    second = Update({"a": torch.zeros(shape)}, member="bob")
    with pytest.raises(BadUpdate, match="'bob' sent other names or shapes than the clients before it"):
        mean([first, second])


def test_who_weighs_nothing_changes_nothing() -> None:
    nothing = Update({"other": torch.full((3,), float("nan"))}, weight=0.0, kind=Kind.KNOWLEDGE, member="nobody")
    one, other = Update({"w": torch.tensor([2.0])}, weight=1), Update({"w": torch.tensor([5.0])}, weight=2)
    for updates in ([nothing, one, other], [one, nothing, other], [one, other, nothing]):
        result = mean(updates)
        assert result.tensors["w"].tolist() == [4.0]  # (1 * 2 + 2 * 5) / 3
        assert (result.weight, result.kind) == (3.0, Kind.DELTA)
    with pytest.raises(NoUpdates, match="nobody's update could be used"):
        mean([nothing, nothing])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int64, torch.int8, torch.uint8])
def test_float8_and_integers_are_averaged_in_float32(dtype: torch.dtype) -> None:
    # (1 * [0, 4] + 3 * [4, 8]) / 4 = [3, 7]; all of these are exact in every type.
    updates = [Update({"w": torch.tensor(x).to(dtype)}, weight=n) for x, n in (([0.0, 4.0], 1), ([4.0, 8.0], 3))]
    result = mean(updates).tensors["w"]
    assert result.dtype == dtype
    assert result.float().tolist() == [3.0, 7.0]
    assert updates[0].tensors["w"].float().tolist() == [0.0, 4.0]


def test_narrow_and_wide_updates_may_meet_and_nobody_narrows_the_others() -> None:
    narrow, wide = Update({"w": torch.ones(1, dtype=torch.bfloat16)}), Update({"w": torch.full((1,), 3.0)})
    for updates in ([narrow, wide], [wide, narrow]):
        result = mean(updates).tensors["w"]
        assert result.dtype == torch.float32
        assert result.tolist() == [2.0]
