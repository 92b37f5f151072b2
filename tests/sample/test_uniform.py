"""Sampling of a fixed number of clients."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, pairwise
from typing import Any

import pytest

from fedfm.errors import RecipeError
from fedfm.sample.uniform import Uniform

IDS = [f"client-{i:02d}" for i in range(20)]


@pytest.mark.parametrize(
    ("sampler", "population", "size"),
    [
        (Uniform(), 20, 20),
        (Uniform(fraction=0.1), 20, 2),
        (Uniform(fraction=0.25), 10, 2),  # 2.5 rounds to the even 2
        (Uniform(fraction=0.01), 20, 1),  # at least one
        (Uniform(count=5), 20, 5),
        (Uniform(count=5), 3, 3),  # no more than there are
        (Uniform(fraction=0.1, count=7), 20, 7),  # count decides
        (Uniform(fraction=0.5), 1, 1),
        (Uniform(count=4), 0, 0),
    ],
)
def test_how_many(sampler: Uniform, population: int, size: int) -> None:
    assert sampler.expected(population) == size
    chosen = sampler.sample(IDS[:population], 1, 0)
    assert len(chosen) == len(set(chosen)) == size
    assert set(chosen) <= set(IDS[:population])


def test_everyone_in_order_when_all_take_part() -> None:
    assert Uniform().sample(IDS, 3, 1) == IDS
    assert Uniform().sample(IDS[::-1], 3, 1) == IDS[::-1]


def test_the_order_of_the_ids_is_kept() -> None:
    for round in range(200):
        chosen = Uniform(count=6).sample(IDS, round, 0)
        assert chosen == [client for client in IDS if client in set(chosen)]


def test_a_round_and_a_seed_name_the_draw() -> None:
    sampler = Uniform(count=5)
    assert [sampler.sample(IDS, r, 7) for r in range(20)] == [sampler.sample(IDS, r, 7) for r in range(20)]
    assert len({tuple(sampler.sample(IDS, r, 7)) for r in range(50)}) > 40
    assert len({tuple(sampler.sample(IDS, 1, s)) for s in range(50)}) > 40


def test_all_subsets_are_equally_likely() -> None:
    # 5 clients, 2 of them: 10 pairs. Over 3000 rounds each is expected 300 times, with a standard deviation of
    # sqrt(3000 * 0.1 * 0.9) = 16.4; five of these are 82.
    counts = Counter(tuple(Uniform(count=2).sample("abcde", round, 0)) for round in range(3000))
    assert counts.keys() == set(combinations("abcde", 2))
    assert all(abs(n - 300) < 82 for n in counts.values()), counts


def test_rounds_that_follow_each_other_are_independent() -> None:
    # One of 4 clients: the same one twice in a row in a quarter of 3000 rounds, give or take 5 * 23.7.
    drawn = [Uniform(count=1).sample("abcd", round, 0)[0] for round in range(3001)]
    same = sum(one == other for one, other in pairwise(drawn))
    assert abs(same - 750) < 119


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fraction": 0.0}, "sampler.fraction must be above 0 and at most 1, but is 0.0."),
        ({"fraction": 1.5}, "sampler.fraction must be above 0 and at most 1, but is 1.5."),
        ({"fraction": -0.1}, "sampler.fraction must be above 0 and at most 1, but is -0.1."),
        ({"fraction": float("nan")}, "sampler.fraction must be above 0 and at most 1, but is nan."),
        ({"count": -1}, "sampler.count must be at least 1, or 0 to use fraction; it is -1."),
    ],
)
def test_what_cannot_be_drawn_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Uniform(**settings)
    assert str(caught.value) == message
