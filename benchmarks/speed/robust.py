"""Every rule of ``fedfm.robust`` on the uploads of one round, beside the plain mean in the same run.

    python -m benchmarks.speed.robust [MB]       # prints a table and writes benchmarks/speed/results/robust.json

Uploads are of 100 clients and 10 MB each unless said otherwise, in two shapes: one tensor, as of a full layer, and LoRA
factors, which are compared by their products. Time is that of the rule and of the mean of what it leaves; each rule
takes turns with the plain mean, and the ratio is of the medians. Rules that judge by public rows are given a model that
costs nothing: their figure is what they do beside the evaluations, one for each upload and one more.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fedfm import parts
from fedfm.core.mean import WeightedMean
from fedfm.core.method import Method, State
from fedfm.core.space import Layout
from fedfm.core.update import Tensors, Update
from fedfm.results import machine
from fedfm.robust import Estimator, Sight

HERE = Path(__file__).parent
CLIENTS, TURNS = 100, 3
WIDTH, RANK = 1024, 8
"""Factors of a layer: rank 8 on a matrix 1024 wide, 65 kB."""
HOSTILE = 20
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "median-of-means": {"groups": 2 * HOSTILE + 1},
    "trimmed-mean": {"fraction": HOSTILE / CLIENTS},
}


@dataclass
class Alone:
    """As much of a server as a screen looks at."""

    space: Layout
    round: int = 1
    mean: Any = field(default_factory=WeightedMean)


@dataclass
class Free(Sight):
    """A sight whose model costs nothing."""

    def loss(self, updates: Sequence[Update]) -> float:
        return float(len(updates))

    def entropy(self, updates: Sequence[Update]) -> float:
        return 0.0

    def curvature(self) -> Tensors:
        return {name: torch.ones_like(tensor) for name, tensor in self.state.weights.items()}

    def own(self) -> Update:
        return Update(self.curvature())

    def guiding(self, member: str, share: float) -> Update:
        return self.own()


def uploads(shapes: Mapping[str, tuple[int, ...]]) -> list[Update]:
    """Honest ones around a common direction and hostile ones turned round."""
    draw = torch.Generator().manual_seed(0)
    common = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}

    def one(k: int) -> Tensors:
        sign = -3.0 if k < HOSTILE else 1.0
        return {n: sign * t + 0.5 * torch.randn(t.shape, generator=draw) for n, t in common.items()}

    return [Update(one(k), member=f"c{k:03}") for k in range(CLIENTS)]


def settings(kind: str, cls: Any) -> dict[str, Any]:
    """The rule as it would be set for so many hostile clients."""
    known = {name for name in ("hostile",) if name in cls.__dataclass_fields__}
    return {"kind": kind, **dict.fromkeys(known, HOSTILE), **SETTINGS.get(kind, {})}


def used(rule: Any, updates: Sequence[Update]) -> Callable[[], Update]:
    """The round's work by this rule."""
    zeros = {name: torch.zeros_like(tensor) for name, tensor in updates[0].tensors.items()}
    messages = {update.member: zeros for update in updates}
    mean = WeightedMean()
    if isinstance(rule, Estimator):
        return lambda: rule(updates)
    return lambda: mean(rule.screen(updates, Free(Alone(Layout(zeros)), Method(), State(zeros), messages)))  # type: ignore[arg-type]


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def compared(name: str, rule: Any, updates: Sequence[Update]) -> dict[str, Any]:
    """Seconds of the rule and of the plain mean, in turns."""
    work, mean = used(rule, updates), WeightedMean()
    turns = [(seconds(work), seconds(lambda: mean(updates))) for _ in range(TURNS)]
    own, beside = (statistics.median(column) for column in zip(*turns, strict=True))
    return {"rule": name, "seconds": round(own, 3), "mean_seconds": round(beside, 3), "ratio": round(own / beside, 2)}


def main() -> None:
    """Time all rules, print them, write them down."""
    rows, megabytes = [], int(sys.argv[1]) if sys.argv[1:] else 10
    entries = megabytes * 250_000
    flat = uploads({"layer.weight": (entries,)})
    for kind, cls in sorted(parts.kinds("robust").items()):
        rows.append(
            {"uploads": "one tensor", **compared(kind, parts.make("robust", settings(kind, cls), "rule"), flat)}
        )
        print(rows[-1], file=sys.stderr, flush=True)
    del flat
    shapes = {
        f"{i}.lora_{side}.weight": shape
        for i in range(entries // (2 * RANK * WIDTH))
        for side, shape in (("A", (RANK, WIDTH)), ("B", (WIDTH, RANK)))
    }
    factors = uploads(shapes)
    for kind, cls in sorted(parts.kinds("robust").items()):
        if "compare" in cls.__dataclass_fields__:  # type: ignore[attr-defined]
            rule = parts.make("robust", {**settings(kind, cls), "compare": "products"}, "rule")
            rows.append({"uploads": "factors, by products", **compared(kind, rule, factors)})
            print(rows[-1], file=sys.stderr, flush=True)
    found = {"machine": machine(), "clients": CLIENTS, "megabytes": megabytes, "hostile": HOSTILE, "rows": rows}
    (HERE / "results/robust.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"{CLIENTS} clients, {megabytes} MB each, {HOSTILE} of them hostile; seconds of a round")
    print(f"{'uploads':<22}{'rule':<20}{'seconds':>9}{'mean':>9}{'ratio':>8}")
    for row in rows:
        print(f"{row['uploads']:<22}{row['rule']:<20}{row['seconds']:>9}{row['mean_seconds']:>9}{row['ratio']:>8}")


if __name__ == "__main__":
    main()
