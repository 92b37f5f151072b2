"""What the engine is meant to reach, beside what result files say."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Result = Mapping[str, Any]

FASTER = {"plain": 2.0, "trl": 2.6, "pfl": 2.3, "flower": 3.3, "flower:reload-one": 3.3, "nvflare": 5.5}
"""How many times as long as the fused trainer each peer should take, in float32 on job a."""
SEQUENTIAL = 1.03
"""Most that the sequential trainer should take of the plain loop's time."""
HALF = 3.5
"""How many times as long as the default in bfloat16 the plain loop in float32 should take."""
MEMORY = 1.5
"""Most that the fused trainer should take of the plain loop's memory."""
EMPTY = 10.0
"""How many times as long Flower's simulation should take for a task that trains nothing."""
CARD = 20.0
"""How many times as long as the fused trainer the sequential one should take on a card, from 32 clients on."""


@dataclass(frozen=True)
class Goal:
    """A goal with what was found.

    Args:
        what: in words.
        limit: the number wanted.
        least: whether the value should be at least the limit, and not at most.
        value: what was found; ``None`` when it was not measured.
        unit: of both.
    """

    what: str
    limit: float
    least: bool
    value: float | None
    unit: str = ""

    @property
    def met(self) -> bool | None:
        """Whether it is reached; ``None`` when that is not known."""
        if self.value is None or math.isnan(self.value):
            return None
        return self.value >= self.limit if self.least else self.value <= self.limit


def goals(results: Mapping[str, Result], names: Callable[[str], str]) -> list[Goal]:
    """All goals.

    Args:
        results: result files by name; those that are absent leave their goals unmeasured.
        names: a peer as people call it.
    """
    return [
        *real_model(results.get("compare-a"), names),
        *empty_work(results.get("compare-c")),
        *crowd(results.get("scale")),
        *card(results.get("gpu")),
        *engine(results.get("overhead")),
    ]


def times(job: Result | None, slow: str, fast: str, reading: str = "train_s") -> float | None:
    """The median over the passes of a reading of one peer over that of another; ``None`` where they did not both run.

    Args:
        job: one of the jobs of a comparison.
        slow: the peer above the line.
        fast: the peer below it.
        reading: ``train_s``, ``peak_mb`` or ``startup_s``.
    """
    passes: Sequence[Result] = job["passes"] if job else ()
    found = [one[slow][reading] / one[fast][reading] for one in passes if slow in one and fast in one]
    return statistics.median(found) if found else None


def real_model(result: Result | None, names: Callable[[str], str]) -> Iterator[Goal]:
    """Of a comparison on a real model."""
    job = result["jobs"][0] if result else None
    own = "fedfm:fused"
    sequential = times(job, "fedfm:sequential", "plain")
    yield Goal("one by one, time of the plain loop", SEQUENTIAL, False, sequential, "times")
    for peer, limit in FASTER.items():
        yield Goal(f"fused, faster than {names(peer)}", limit, True, times(job, peer, own), "times")
    ran = job["summary"] if job else {}
    half = next((mode for mode in ("fedfm:default", "fedfm:fused-bf16") if mode in ran), "fedfm:fused-bf16")
    yield Goal("fused in bf16, faster than the plain loop in float32", HALF, True, times(job, "plain", half), "times")
    yield Goal("fused, memory of the plain loop", MEMORY, False, times(job, own, "plain", "peak_mb"), "times")


def empty_work(result: Result | None) -> Iterator[Goal]:
    """Of client tasks that train nothing: the worst over the numbers of clients."""
    by_size: dict[float, list[float]] = {}
    for job in result["jobs"] if result else ():
        own = next((name for name in job["summary"] if name.startswith("fedfm")), "fedfm")
        if (found := times(job, "flower", own)) is not None:
            by_size.setdefault(job["job"]["megabytes"], []).append(found)
    for megabytes in sorted(by_size) or [0.0]:
        what = f"empty task{f' with {megabytes:g} MB' if megabytes else ''}, faster than Flower's simulation"
        yield Goal(what, EMPTY, True, min(by_size.get(megabytes, []), default=None), "times")


def crowd(result: Result | None) -> Iterator[Goal]:
    """Of many clients."""
    for one in result["goals"] if result else ():
        yield Goal(one["what"], one["goal"], False, one["value"], one["unit"])
    if not result:
        yield Goal("an extra registered client", 1000, False, None, "bytes")


def card(result: Result | None) -> Iterator[Goal]:
    """Of a CUDA card: the worst from 32 clients on."""
    ratios = [one["ratio"] for one in result["rows"] if one["clients"] >= 32] if result else []
    yield Goal("on a CUDA card, fused faster than one by one", CARD, True, min(ratios, default=None), "times")


def engine(result: Result | None) -> Iterator[Goal]:
    """Of the engine beside a plain loop: these goals stand in the names of the readings."""
    for what, value in result["results"].items() if result else ():
        if found := re.fullmatch(r"(.*) \(goal ([\d.]+)\)", what):
            yield Goal(found[1], float(found[2]), False, value)
