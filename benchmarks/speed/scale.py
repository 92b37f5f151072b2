"""What clients cost that are registered, sampled, sent an update by, or remembered.

    python -m benchmarks.speed.scale             # all, some minutes; writes results/scale.json
    python -m benchmarks.speed.scale cohort      # one part; prints it and writes nothing

Each figure is the median of fresh processes that take turns over the settings. Memory is what the process holds beyond
what it held with the model loaded and the rows mapped, after a garbage collection; read on Linux. The parts:

- registered: start-up and memory against the number of clients that are there, of which 1,000 are visited. The rows are
  an Arrow table on disk, three a client, dealt by chance or by a column that names the client.
- round: a round of 10,000 sampled clients that train a tiny model for one step.
- cohort: memory of a round against the number of clients that send an update of 10 MB. The server keeps a running mean,
  so the number should not matter.
- private: memory against the number of clients that keep private tensors (FedSA-LoRA), beside a method that keeps none
  (FedIT). The tensors go to disk, so only what both methods have should be there.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.speed.crowd import ENGINES, METHODS, PARTS, Found, rows_of
from fedfm.results import machine
from fedfm.store.files import write_json

RESULT = Path(__file__).parent / "results" / "scale.json"
REPEATS = 3
Settings = dict[str, Any]


def settings(folder: Path) -> dict[str, list[Settings]]:
    """What is measured, by part.

    Args:
        folder: where tables of rows lie, or are written.
    """
    counts = (1_000, 10_000, 100_000, 1_000_000)
    return {
        "registered": [
            {"clients": n, "partition": kind, "visited": 1_000, "rows": str(rows_of(n, folder))}
            for n in counts
            for kind in ("iid", "natural")
        ],
        "round": [{"clients": 10_000, "population": 100_000, "rows": str(rows_of(100_000, folder))}],
        "cohort": [
            {"clients": n, "engine": engine, "width": 256, "blocks": 10} for n in (10, 100, 1_000) for engine in ENGINES
        ],
        "private": [{"clients": n, "method": method, "width": 64} for n in (1_000, 10_000) for method in METHODS],
    }


def fresh(part: str, setting: Settings) -> Found:
    """What a process of its own finds."""
    command = [sys.executable, "-m", "benchmarks.speed.scale", "--one", part, json.dumps(setting)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env={**os.environ, "TQDM_DISABLE": "1"})
    return json.loads(done.stdout.splitlines()[-1])


def medians(found: Sequence[Found]) -> Found:
    """The median of each reading."""
    return {name: statistics.median(one[name] for one in found) for name in found[0]}


def measured(part: str, asked: Sequence[Settings], repeats: int = REPEATS) -> list[Found]:
    """Each setting with the medians of its readings; settings take turns, so that a slow minute meets all."""
    readings: list[list[Found]] = [[] for _ in asked]
    for number in range(repeats):
        print(f"{part}: pass {number + 1} of {repeats}", file=sys.stderr, flush=True)
        for own, setting in zip(readings, asked, strict=True):
            own.append(fresh(part, setting))
    shown = [{k: v for k, v in setting.items() if k != "rows"} for setting in asked]
    return [setting | medians(own) for setting, own in zip(shown, readings, strict=True)]


def goals(found: Mapping[str, Sequence[Found]]) -> Iterator[Found]:
    """What was wanted beside what was found: ``{"what", "value", "unit", "goal", "met"}``.

    The goal is a number that the value must stay below.
    """

    def goal(what: str, value: float, unit: str, limit: float) -> Found:
        return {"what": what, "value": value, "unit": unit, "goal": limit, "met": value < limit}

    for kind in ("iid", "natural"):
        few, many = ends([one for one in found.get("registered", ()) if one["partition"] == kind])
        if many:
            cost = slope(few, many, "built_used_mb") * 1e6
            yield goal(f"an extra registered client, {kind}", cost, "bytes", 1000)
    for engine in ENGINES:
        few, many = ends([one for one in found.get("cohort", ()) if one["engine"] == engine])
        if many:
            # One more update would be held for each client if the server kept them.
            more = (many["peak_mb"] - few["peak_mb"]) / many["update_mb"]
            what = f"peak with {many['clients']:,} clients over that with {few['clients']:,}, {engine}"
            yield goal(what, more, "updates", 1)
    with_state, without = (
        ends([one for one in found.get("private", ()) if one["method"] == m]) for m in ("fedsa-lora", "fedit")
    )
    if with_state[1] and without[1]:
        more = sum(s * (a["visited_used_mb"] - b["visited_used_mb"]) for s, (b, a) in ((1, with_state), (-1, without)))
        share = more / (with_state[1]["kept_mb"] - with_state[0]["kept_mb"])
        yield goal("private tensors of clients that stay in memory", 100 * share, "percent", 10)


def ends(found: Sequence[Found]) -> tuple[Found, Found]:
    """The settings with fewest and with most clients; nothing unless there are two."""
    order = sorted(found, key=lambda one: one["clients"])
    return (order[0], order[-1]) if len(order) > 1 else ({}, {})


def slope(few: Found, many: Found, reading: str) -> float:
    """How much a reading grows with each client."""
    return (many[reading] - few[reading]) / (many["clients"] - few["clients"])


def versions() -> dict[str, str]:
    """Of what is measured and what it stands on."""
    names = ("fedfm", "torch", "transformers", "peft", "datasets", "pyarrow")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def show(part: str, found: Sequence[Found], console: Console) -> None:
    """Print a part."""
    table = Table(*found[0], title=part, title_justify="left")
    for one in found:
        table.add_row(
            *(f"{v:,.2f}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else v for v in one.values())
        )
    console.print(table)


def show_goals(found: Sequence[Found], console: Console) -> None:
    """Print goals."""
    table = Table("what", "found", "goal", "met", title="goals", title_justify="left")
    for one in found:
        table.add_row(
            one["what"], f"{one['value']:.3g} {one['unit']}", f"below {one['goal']:g}", "yes" if one["met"] else "no"
        )
    console.print(table)


def main(words: Sequence[str]) -> int:
    """Measure, print, write. Returns 1 when a goal is not met."""
    warnings.filterwarnings("ignore")
    if words[:1] == ["--one"]:
        print(json.dumps(PARTS[words[1]](**json.loads(words[2]))))
        return 0
    console = Console(width=140)
    found: dict[str, list[Found]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for part, asked in settings(Path(folder)).items():
            if not words or part in words:
                found[part] = measured(part, asked)
                show(part, found[part], console)
    wanted = list(goals(found))
    show_goals(wanted, console)
    if not words:
        about = {"machine": machine(), "versions": versions(), "threads": torch.get_num_threads(), "repeats": REPEATS}
        write_json(RESULT, {**about, **found, "goals": wanted})
    return int(not all(one["met"] for one in wanted))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
