"""A claim tried: the method and its baseline on the same clients with the same seeds, and what came of it.

    python -m benchmarks.fidelity.run METHOD [METHOD ...]    # writes results/METHOD.json
    python -m benchmarks.fidelity.run --all                  # every claim, then docs/fidelity.md
    python -m benchmarks.fidelity.run --quick METHOD         # one seed, one round: only whether it runs
    python -m benchmarks.fidelity.run --table                # docs/fidelity.md from the results

Each finished run is kept in ``results/.runs`` under a digest of its settings and of the source code. So a killed
command goes on where it was, methods share their baselines, and nothing old is shown as new.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.fidelity import table
from benchmarks.fidelity.claim import Claim, Score
from benchmarks.fidelity.claims import CLAIMS
from benchmarks.fidelity.scenarios import SCENARIOS
from benchmarks.fidelity.trial import SEEDS, kept
from fedfm.store.files import write_json

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[2] / "docs" / "fidelity.md"


def compare(id: str, claim: Claim, quick: bool = False) -> dict[str, Any]:
    """The content of ``results/ID.json``."""
    seeds = SEEDS[:1] if quick else SEEDS
    less = {"rounds": 1} if quick else {}
    sides = {
        "method": {"method": id, **claim.both, **claim.run, **less},
        "baseline": {"method": "fedavg", **claim.both, **claim.against, **less},
    }
    runs: dict[str, list[Score]] = {who: [] for who in sides}
    for seed in seeds:
        for who, arguments in sides.items():
            score = kept(RESULTS / ".runs", claim.scenario, seed, arguments)
            runs[who].append(score)
            what = f"{claim.metric} {score[claim.metric]}, {score['seconds']} s"
            print(f"{id}, seed {seed}, {who} {arguments['method']}: {what}", file=sys.stderr, flush=True)
    verdict = claim.judge(runs["method"], runs["baseline"])
    return {
        "id": id,
        "claim": claim.sentence,
        "setting": SCENARIOS[claim.scenario].describe(),
        "metric": claim.metric,
        "better": "lower" if claim.lower else "higher",
        "rule": claim.rule,
        "seeds": list(seeds),
        **{who: side(runs[who], claim.metric, arguments) for who, arguments in sides.items()},
        **asdict(verdict),
        "note": "" if verdict.claim_shown else claim.note,
    }


def side(runs: Sequence[Score], metric: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Method or baseline in the result file: mean and standard deviation over seeds, costs of a run on average."""
    values = [run[metric] for run in runs]
    whole = all(value is not None for value in values)
    costs = {n: statistics.fmean(r[n] for r in runs) for n in ("bytes_up", "bytes_down", "seconds", "memory_mb")}
    return {
        "arguments": dict(arguments),
        "mean": statistics.fmean(values) if whole else None,
        "spread": statistics.stdev(values) if whole and len(values) > 1 else None,
        "values": values,
        **{name: round(value, 1) for name, value in costs.items()},
    }


def main(words: Sequence[str] | None = None) -> int:
    """The command. Returns how many claims could not be tried."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fidelity.run")
    parser.add_argument("ids", nargs="*", metavar="METHOD", help="as `fedfm methods` lists them")
    parser.add_argument("--all", action="store_true", help="every claim, then the table")
    parser.add_argument("--quick", action="store_true", help="one seed and one round; kept apart from the results")
    parser.add_argument("--table", action="store_true", help="write docs/fidelity.md")
    asked = parser.parse_args(words)
    chosen = list(CLAIMS) if asked.all else asked.ids
    if unknown := [id for id in chosen if id not in CLAIMS]:
        parser.error(f"no claim of {', '.join(unknown)} is known; there are {', '.join(CLAIMS)}.")
    if not chosen and not asked.table:
        parser.error("name a method, or say --all or --table.")
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    failed = []
    for id in chosen:
        try:
            result = compare(id, CLAIMS[id], asked.quick)
        except Exception:
            # One method that cannot run must not hide what the others do; the exit code tells.
            traceback.print_exc()
            failed.append(id)
            continue
        write_json((RESULTS / ".quick" if asked.quick else RESULTS) / f"{id}.json", result)
        print(f"{id}: {'runs' if asked.quick else 'shown' if result['claim_shown'] else 'not shown'}", flush=True)
    if asked.table or (asked.all and not asked.quick):
        PAGE.write_text(table.page(RESULTS))
    if failed:
        print(f"could not be tried: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
