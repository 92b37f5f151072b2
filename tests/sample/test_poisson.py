"""Each client by its own coin."""

from __future__ import annotations

from collections import Counter

import pytest

from fedfm.errors import RecipeError
from fedfm.sample.poisson import Poisson

IDS = [f"client-{i:02d}" for i in range(20)]


def test_the_rate_is_the_mean() -> None:
    # 20 clients at 0.3 for 3000 rounds: 6 a round; standard deviation of the mean sqrt(20 * 0.3 * 0.7 / 3000) = 0.037.
    sampler = Poisson(0.3)
    sizes = [len(sampler.sample(IDS, round, 0)) for round in range(3000)]
    assert sampler.expected(20) == pytest.approx(6.0)
    assert abs(sum(sizes) / 3000 - 6.0) < 0.19
    # Binomial, not fixed: variance 20 * 0.3 * 0.7 = 4.2, here within a quarter of it.
    variance = sum((n - 6.0) ** 2 for n in sizes) / 3000
    assert 3.15 < variance < 5.25


def test_each_subset_comes_as_often_as_independent_coins_say() -> None:
    # 3 clients at 0.5: 8 subsets, each with probability 1/8: 375 of 3000, standard deviation 18.1; five are 91.
    counts = Counter("".join(Poisson(0.5).sample("abc", round, 0)) for round in range(3000))
    assert counts.keys() == {"", "a", "b", "c", "ab", "ac", "bc", "abc"}
    assert all(abs(n - 375) < 91 for n in counts.values()), counts


def test_every_client_is_equally_likely() -> None:
    # At 0.2 each of 10 clients is expected 600 times in 3000 rounds, standard deviation 21.9; five are 110.
    counts = Counter(client for round in range(3000) for client in Poisson(0.2).sample("abcdefghij", round, 1))
    assert all(abs(counts[client] - 600) < 110 for client in "abcdefghij"), counts


def test_the_order_of_the_ids_is_kept_and_nobody_comes_twice() -> None:
    for round in range(200):
        chosen = Poisson(0.4).sample(IDS, round, 0)
        assert chosen == [client for client in IDS if client in set(chosen)]


def test_a_round_and_a_seed_name_the_draw() -> None:
    sampler = Poisson(0.5)
    assert [sampler.sample(IDS, r, 7) for r in range(20)] == [sampler.sample(IDS, r, 7) for r in range(20)]
    assert len({tuple(sampler.sample(IDS, r, 7)) for r in range(50)}) > 45
    assert len({tuple(sampler.sample(IDS, 1, s)) for s in range(50)}) > 45


def test_a_round_may_be_empty_and_rate_one_is_everybody() -> None:
    assert [] in [Poisson(0.01).sample("ab", round, 0) for round in range(10)]
    assert all(Poisson(1.0).sample(IDS, round, 0) == IDS for round in range(20))
    assert Poisson(0.5).sample([], 1, 0) == []


@pytest.mark.parametrize("rate", [0.0, -0.5, 1.01, float("nan"), float("inf")])
def test_what_is_no_probability_is_refused(rate: float) -> None:
    with pytest.raises(RecipeError) as caught:
        Poisson(rate)
    assert str(caught.value) == f"sampler.rate must be above 0 and at most 1, but is {rate}."
