"""Bytes on the wire: the demo's recipe in one process with stages that make uploads smaller.

    python -m benchmarks.deploy.wire              # writes results/wire.json

Bytes are those of ``metrics.jsonl``: encoded as they travel, headers and all, in the mean over the rounds. A ratio of 4
means a quarter of what float32 takes. Losses are those of held-out rows, in the mean over clients, before and after as
many steps by each; over so few rounds what top-k saves up on the clients has hardly been sent, so its loss says what a
short run loses, not where a long one would end.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.deploy import commands
from benchmarks.deploy.commands import RESULTS, ROOT, about, rounds
from benchmarks.speed.sections import grid
from fedfm.store.files import write_json

TOPK = {"kind": "topk", "fraction": 0.1}
STAGES: dict[str, list[Any]] = {
    "float32": [],
    "bfloat16": ["half"],
    "QSGD, 8 bits": [{"kind": "qsgd", "levels": 127}],
    "QSGD, 4 bits": [{"kind": "qsgd", "levels": 7}],
    "top-k, 10 %": [TOPK],
    "top-k, 10 %, then QSGD, 8 bits": [TOPK, {"kind": "qsgd", "levels": 127}],
    "top-k, 10 %, then QSGD, 4 bits": [TOPK, {"kind": "qsgd", "levels": 7}],
}
"""What is done to uploads; the first is what the others are compared to."""
PLAIN = next(iter(STAGES))


def tried(stages: Sequence[Any], folder: Path, seed: int, count: int) -> dict[str, Any]:
    """A run with some stages: bytes of a round, losses on held-out rows.

    Args:
        stages: as a recipe has them.
        folder: an empty one.
        seed: of the run.
        count: rounds.
    """
    recipe = yaml.safe_load((ROOT / "recipes" / "demo.yaml").read_text())
    own = {"stages": list(stages), "rounds": count, "references": [], "samples": 0, "seed": seed}
    place = folder / "recipe.yaml"
    place.write_text(yaml.safe_dump({**recipe, **own, "evaluation": {"every": 0}}, sort_keys=False))
    done = commands.home(place, folder / "run", timeout_s=900, clients=0)
    if not done.good:
        return {"seed": seed, "failure": done.said}
    results, records = done.results(), rounds(done.records())
    if any(record["dropped"] for record in records):
        return {"seed": seed, "failure": f"a client was dropped: {records[-1]['dropped']}"}
    before, after = results["test"]["base"], results["test"][results["method"]]
    return {
        "seed": seed,
        "clients": len(records[-1]["participants"]),
        "bytes_up": statistics.fmean(record["bytes_up"] for record in records),
        "bytes_down": statistics.fmean(record["bytes_down"] for record in records),
        "before": before["mean"]["loss"],
        "after": after["mean"]["loss"],
        "seconds": round(commands.total(records, "seconds"), 2),
    }


def row(name: str, runs: Sequence[Mapping[str, Any]], plain: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the result file says of some stages: the mean over seeds."""
    if failed := [run["failure"] for run in (*runs, *plain) if "failure" in run]:
        return {"name": name, "stages": STAGES[name], "failure": failed[0], "runs": list(runs)}
    mean = {key: statistics.fmean(run[key] for run in runs) for key in ("bytes_up", "before", "after")}
    ratio = statistics.fmean(one["bytes_up"] / run["bytes_up"] for one, run in zip(plain, runs, strict=True))
    worse = [run["after"] - one["after"] for one, run in zip(plain, runs, strict=True)]
    return {
        "name": name,
        "stages": STAGES[name],
        "clients": runs[0]["clients"],
        **mean,
        "ratio": ratio,
        "worse": statistics.fmean(worse),
        "worse_least": min(worse),
        "worse_most": max(worse),
        "runs": list(runs),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The result file for the terminal."""
    good = [r for r in rows if "failure" not in r]
    cells = [(r["name"], f"{r['bytes_up']:,.0f}", *(f"{r[k]:.3f}" for k in ("ratio", "before", "after"))) for r in good]
    return grid(("upload", "bytes a round", "ratio", "loss before", "after"), cells)


def main(words: Sequence[str] | None = None) -> int:
    """The command. Returns 1 when a run failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.deploy.wire")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, default=RESULTS / "wire.json")
    asked = parser.parse_args(words)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in STAGES}
    for seed in map(int, asked.seeds.split(",")):
        for name, stages in STAGES.items():
            with tempfile.TemporaryDirectory(prefix="fedfm-") as scratch:
                found[name].append(tried(stages, Path(scratch), seed, asked.rounds))
            print(f"seed {seed}, {name}: {found[name][-1]}", file=sys.stderr, flush=True)
    rows = [row(name, runs, found[PLAIN]) for name, runs in found.items()]
    print("\n".join(table(rows)))
    write_json(asked.out, {**about(), "rounds": asked.rounds, "rows": rows})
    return int(any("failure" in one for one in rows))


if __name__ == "__main__":
    commands.ends_with_what_it_started()
    sys.exit(main())
