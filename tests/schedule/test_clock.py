"""Who is at work, who finishes next."""

from __future__ import annotations

import math
from collections import Counter
from statistics import mean, pstdev
from typing import Any

import pytest

from fedfm.core.update import Member
from fedfm.errors import RecipeError
from fedfm.schedule.buffered import Buffered
from fedfm.schedule.clock import Clock

IDS = list("abcdef")
TIMES = {"a": 1.0, "b": 2.0, "c": 3.5, "d": 5.0, "e": 8.0, "f": 13.0}


def clock(memory: Any = (), *, seed: int = 0, concurrency: int = 6, ids: list[str] = IDS) -> Clock:
    return Clock(seed, ids, concurrency, lambda id, version: TIMES[id], dict(memory))


def test_tasks_finish_in_the_order_of_their_times() -> None:
    one = clock()
    assert [t.client for t in one.finished(3)] == ["a", "b", "c"]
    assert one.now == 3.5
    # Nobody is asked twice at a version, so the others are all that come.
    assert [t.client for t in one.finished(10)] == ["d", "e", "f"]
    assert one.now == 13.0
    assert one.finished(1) == []


def test_two_versions_by_hand() -> None:
    # Everyone starts at 0 from version 0. At 2.0, after a and b, the server acts. Then a starts at 2 and finishes at 3,
    # b at 2 and 4; c is done at 3.5 and started from version 0, so it is one version old.
    first = clock()
    first.finished(2)
    second = clock(first.memory())
    done = second.finished(3)
    assert [(t.client, t.finish, t.version) for t in done] == [("a", 3.0, 1), ("c", 3.5, 0), ("b", 4.0, 1)]
    assert second.version == 1


def test_the_next_starts_when_one_finishes() -> None:
    # Two in flight of six: a task starts at the moment at which another finishes.
    one = clock(concurrency=2)
    done = one.finished(6)
    assert sorted(t.client for t in done) == IDS
    free = [0.0, 0.0]
    for task in done:
        begun = task.finish - TIMES[task.client]
        assert min(abs(begun - at) for at in free) < 1e-9
        free.append(task.finish)


def test_the_number_in_flight_is_bounded_and_clients_are_different() -> None:
    memory: dict[str, Any] = {}
    for _ in range(20):
        one = clock(memory, concurrency=4)
        for _ in range(2):
            one.finished(1)
            one.start(one._duration)
            assert len(one.flying) == 4
            assert len({t.client for t in one.flying}) == 4
        memory = one.memory()


def test_nobody_is_asked_twice_at_a_version() -> None:
    memory: dict[str, Any] = {}
    seen: Counter[tuple[str, int]] = Counter()
    for _ in range(30):
        one = clock(memory, concurrency=2)
        seen.update((t.client, t.version) for t in one.finished(5))
        memory = one.memory()
    assert max(seen.values()) == 1


def test_the_version_counts_server_updates() -> None:
    memory: dict[str, Any] = {}
    for version in range(5):
        one = clock(memory)
        assert one.version == version
        one.finished(1)
        memory = one.memory()


def test_the_seed_names_the_order() -> None:
    def order(seed: int) -> list[str]:
        return [t.client for t in clock(seed=seed, concurrency=1).finished(6)]

    assert order(3) == order(3)
    assert len({tuple(order(seed)) for seed in range(30)}) > 20


def test_every_client_is_as_likely_to_be_next() -> None:
    # 3000 first draws of six: 500 each, standard deviation sqrt(3000 * 5/36) = 20.4; five are 102.
    counts = Counter(clock(seed=seed, concurrency=1).finished(1)[0].client for seed in range(3000))
    assert all(abs(counts[id] - 500) < 102 for id in IDS), counts


def test_memory_goes_on_where_it_stopped() -> None:
    whole, cut = clock(concurrency=3), clock(concurrency=3)
    whole.finished(2)
    cut.finished(2)
    again = clock(cut.memory(), concurrency=3)
    other = clock(whole.memory(), concurrency=3)
    assert again.finished(5) == other.finished(5)
    assert again.memory() == other.memory()


def test_equal_times_go_by_name() -> None:
    one = Clock(0, IDS, 6, lambda id, version: 1.0, {})
    assert [t.client for t in one.finished(6)] == IDS


def test_speeds_are_log_normal_by_client() -> None:
    # ln of the duration is N(0, sigma^2): for 2000 clients the mean has standard deviation 0.5 / sqrt(2000) = 0.011.

    schedule = Buffered(sigma=0.5, jitter=0.0)
    logs = [math.log(schedule.duration(0, Member(f"c{i}", 1), 0)) for i in range(2000)]
    assert abs(mean(logs)) < 0.056
    assert pstdev(logs) == pytest.approx(0.5, abs=0.04)
    assert schedule.duration(0, Member("x", 1), 0) == schedule.duration(0, Member("x", 1), 9)
    assert schedule.duration(0, Member("x", 1), 0) != schedule.duration(1, Member("x", 1), 0)


def test_a_profile_gives_the_speed_and_each_task_its_jitter() -> None:
    fast = Member("x", 1, {"speed": 4.0})
    assert Buffered(jitter=0.0).duration(0, fast, 0) == 0.25
    times = [Buffered(jitter=0.1).duration(0, fast, version) for version in range(200)]
    assert len(set(times)) == 200
    assert mean(times) == pytest.approx(0.25, rel=0.05)
    with pytest.raises(RecipeError, match=r"profiles\.speed must be above 0 and finite, but is 0\.0 for client 'x'"):
        Buffered().duration(0, Member("x", 1, {"speed": 0.0}), 0)
