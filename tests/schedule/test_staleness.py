"""How much an upload from an older model counts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from fedfm.schedule.buffered import Buffered
from fedfm.schedule.mixing import Mixing
from fedfm.schedule.staleness import constant, hinge, polynomial

ALL = {
    "constant": constant,
    "sqrt": partial(polynomial, power=0.5),
    "steep": partial(polynomial, power=2.0),
    "flat": partial(polynomial, power=0.0),
    "hinge": partial(hinge, slope=10.0, grace=4),
    "at once": partial(hinge, slope=0.5, grace=0),
}


@pytest.mark.parametrize("discount", ALL.values(), ids=ALL.keys())
def test_it_is_one_at_the_start_and_never_rises(discount: Callable[[int], float]) -> None:
    values = [discount(u) for u in range(200)]
    assert values[0] == 1.0
    assert values == sorted(values, reverse=True)
    assert min(values) > 0


def test_by_hand() -> None:
    # (1 + 3)^-1/2 = 1/2, (1 + 8)^-1/2 = 1/3; hinge with a = 10, b = 4: 1 up to 4, then 1/11, 1/21.
    assert [polynomial(u, 0.5) for u in (3, 8)] == pytest.approx([1 / 2, 1 / 3])
    assert [hinge(u, 10.0, 4) for u in (4, 5, 6)] == pytest.approx([1.0, 1 / 11, 1 / 21])
    assert constant(1000) == 1.0


def test_a_schedule_names_its_discount() -> None:
    assert Buffered(discount="constant").weight(8) == 1.0
    assert Buffered().weight(8) == pytest.approx(1 / 3)
    assert Mixing(power=1.0).weight(3) == pytest.approx(1 / 4)
    assert Mixing(discount="hinge", slope=1.0, grace=2).weight(5) == pytest.approx(1 / 4)
