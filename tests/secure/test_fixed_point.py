"""Values as integers: exact sums, no overflow at the bound, nothing that grows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedfm.core.update import Kind, Update
from fedfm.errors import BadUpdate
from fedfm.secure.fixed_point import FixedPoint, Ring


def update(values: list[float], weight: float = 1.0, **more: list[float]) -> Update:
    return Update({"w": torch.tensor(values), **{n: torch.tensor(v) for n, v in more.items()}}, weight)


def test_encoding_by_hand() -> None:
    # 4 bits: levels -7..7; M = 3.5, so the step is 0.5.
    code = FixedPoint(4, 3.5, 9)
    assert (code.levels, code.step) == (7, 0.5)
    vector = code.encode(update([0.74, -0.74, 3.5, -9.0, 0.0, 0.49], 3, a=[1.0]), Ring(2))
    # 'a' comes first: 2 * 3; then trunc(1.48) * 3, ...; the weight; one value was clamped.
    assert Ring(2).signed(vector).tolist() == [6, 3, -3, 21, -21, 0, 0, 3, 1]


def test_the_mean_is_that_of_the_integers() -> None:
    code = FixedPoint(4, 3.5, 9)
    ring = code.ring(2)
    one, two = update([1.0, -2.0], 3), update([2.0, 9.0], 1)
    total = ring.signed(code.encode(one, ring) + code.encode(two, ring))
    mean, clamped = code.decode(total, 2, one.tensors, Kind.DELTA)
    assert mean.tensors["w"].tolist() == [(3 * 1.0 + 2.0) / 4, (3 * -2.0 + 3.5) / 4]
    assert (mean.weight, clamped, mean.kind) == (4.0, 1, Kind.DELTA)


@pytest.mark.parametrize("width", range(1, 9))
def test_rings_pack_and_wrap(width: int) -> None:
    ring, half = Ring(width), 2 ** (8 * width - 1)
    numbers = np.array([0, 1, -1, half - 1, -half, 5 - half], dtype=object)
    vector = np.array([int(n) % 2 ** (8 * ring.dtype.itemsize) for n in numbers], ring.dtype)
    packed = ring.pack(vector)
    assert packed.shape == (6, width)
    assert ring.signed(ring.unpack(packed)).tolist() == numbers.tolist()
    # Backwards 0 meets 5 - half, 1 meets -half, and -1 meets half - 1; what is too large when doubled wraps around.
    assert ring.signed(ring.unpack(packed) + ring.unpack(packed)[::-1])[:3].tolist() == [5 - half, 1 - half, half - 2]
    assert ring.signed(ring.unpack(packed) * ring.dtype.type(2))[3] == -2


@pytest.mark.parametrize(
    ("bits", "weight", "clients"),
    [(2, 1, 3), (8, 1, 2), (16, 1, 2), (8, 1, 100), (16, 1, 3), (24, 65536, 1000), (32, 1000, 9)],
)
def test_a_sum_of_the_largest_vectors_does_not_overflow(bits: int, weight: int, clients: int) -> None:
    code = FixedPoint(bits, 1.0, weight)
    ring = code.ring(clients)
    assert 2 * clients * code.levels * weight < 2 ** (8 * ring.width)
    assert ring.width == 1 or 2 * clients * code.levels * weight >= 2 ** (8 * (ring.width - 1))
    vector = code.encode(update([1.0, -1.0, 77.0], weight), ring)
    total = ring.zeros(5)
    for _ in range(clients):
        total += vector
    most = clients * weight * code.levels
    assert ring.signed(total).tolist() == [most, -most, most, clients * weight, clients]


def test_nothing_grows_and_the_error_is_below_a_step() -> None:
    code = FixedPoint(10, 0.5, 1)
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 0.3
    ring = code.ring(3)
    back, clamped = code.decode(ring.signed(code.encode(Update({"w": values}), ring)), 1, {"w": values}, Kind.DELTA)
    error = back.tensors["w"].double() - values.double().clamp(-0.5, 0.5)
    assert (back.tensors["w"].abs() <= values.abs()).all()
    assert back.tensors["w"].norm() <= values.norm()
    assert error.abs().max() < code.step
    assert clamped == int((values.abs() > 0.5).sum()) > 0


def test_the_largest_value_is_the_highest_level_for_all_bits() -> None:
    for bits in range(2, 33):
        code = FixedPoint(bits, 0.3, 1)
        ring = code.ring(3)
        back = ring.signed(code.encode(Update({"w": torch.tensor([0.3, -0.3], dtype=torch.float64)}), ring))
        assert back[:2].tolist() == [code.levels, -code.levels]


@pytest.mark.parametrize("weight", [0.0, 0.5, 10.0, -1.0])
def test_weights_that_cannot_be_summed(weight: float) -> None:
    with pytest.raises(BadUpdate, match=r"its weight \S+ is no whole number from 1 to the 9 of max_weight: raise that"):
        FixedPoint(8, 1.0, 9).encode(update([0.0], weight), Ring(4))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_none(value: float) -> None:
    with pytest.raises(BadUpdate, match="tensor 'w' is not finite"):
        FixedPoint(8, 1.0, 9).encode(update([0.0, value]), Ring(4))
    with pytest.raises(BadUpdate, match=r"tensor 'w' holds torch\.int64"):
        FixedPoint(8, 1.0, 9).encode(Update({"w": torch.tensor([1])}), Ring(4))


def test_a_sum_of_something_else_is_noticed() -> None:
    code = FixedPoint(8, 1.0, 9)
    like = {"w": torch.zeros(2)}
    for total in ([0, 0, 1, 0], [0, 0, 19, 0], [0, 0, 2, -1], [255, 0, 2, 0], [0, -255, 2, 0]):
        with pytest.raises(BadUpdate, match="the sum is none of what clients send"):
            code.decode(np.array(total), 2, like, Kind.DELTA)
    assert code.length(like) == 4
    assert code.decode(np.array([254, -254, 2, 0]), 2, like, Kind.DELTA)[0].tensors["w"].tolist() == [1.0, -1.0]


def test_types_and_order_are_those_of_the_message() -> None:
    code = FixedPoint(8, 1.0, 9)
    like = {"z": torch.zeros(1, dtype=torch.bfloat16), "a": torch.zeros(2, 1), "empty": torch.zeros(0)}
    ring = code.ring(3)
    sent = Update({"a": torch.ones(2, 1), "z": -torch.ones(1), "empty": torch.zeros(0)}, 2)
    mean, _ = code.decode(ring.signed(code.encode(sent, ring)), 1, like, Kind.WEIGHTS)
    assert [(n, t.dtype, t.flatten().tolist()) for n, t in mean.tensors.items()] == [
        ("z", torch.bfloat16, [-1.0]),
        ("a", torch.float32, [1.0, 1.0]),
        ("empty", torch.float32, []),
    ]
