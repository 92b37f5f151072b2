"""Watermarks measured: what they cost, what they survive, whom they trace, and how often they claim what is not theirs.

    PYTHONPATH=src:. python -m benchmarks.fidelity.ownership          # writes ownership.json and the tables in docs
    PYTHONPATH=src:. python -m benchmarks.fidelity.ownership --page   # the tables from ownership.json

Each run is written down when it is done, and a command that was ended goes on with those that are missing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.fidelity.claims import COPIES
from benchmarks.fidelity.scenarios import SCENARIOS
from benchmarks.fidelity.theft import stolen
from benchmarks.fidelity.trial import federation
from fedfm import parts
from fedfm.core.update import Tensors
from fedfm.federation import Federation
from fedfm.ownership import DUW, Waffle
from fedfm.ownership.chance import threshold
from fedfm.ownership.marking import Marking
from fedfm.ownership.suspect import Present
from fedfm.results import machine
from fedfm.store.files import write_json

HERE = Path(__file__).parent
RESULTS = HERE / "ownership.json"
PAGE = HERE.parents[1] / "docs" / "ownership.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"

SCENARIO = "agnews-iid"
SEEDS = (1, 2)
MARKS: dict[str, dict[str, Any]] = {
    "waffle": {"kind": "waffle"},
    "waffle (renewal: 1)": {"kind": "waffle", "renewal": 1.0},
    "trigger-set-watermark": {"kind": "trigger-set-watermark"},
    "fedipr": {"kind": "fedipr"},
    "fedipr (strength: 5, margin: 0.1)": {"kind": "fedipr", "strength": 5.0, "margin": 0.1},
}
ENOUGH = "marked"
"""Where a model has learnt its task, and clients are few enough to teach each a copy in every round."""
STRANGERS = (11,)
"""Seeds of models that are trained without a key, of rows and weights of their own."""
KEYS = 20
"""Keys that each of them is asked by."""
FEWER = 4
"""Keys of DUW that strangers' models are asked by, each with marks of four clients."""
LOOSE = 0.01
"""A rate of false claims that so few trials can see."""


def accuracy(run: Federation, weights: Tensors) -> float:
    """Over all test rows, of one model for all."""
    plain = run.like(run.method)
    found = plain.assess(replace(plain.start(), weights=weights))
    assert found is not None
    return found.pooled["accuracy"]


def marked(mark: Mapping[str, Any], seed: int, scenario: str = SCENARIO) -> dict[str, Any]:
    """A run with a watermark, and what is left of it after each change; of copies, of each client's."""
    began = time.perf_counter()
    run = federation(scenario, seed, {"method": "fedavg", "watermark": mark})
    outcome = run.run()
    seconds, marking = time.perf_counter() - began, run.marking
    assert marking is not None
    copies = marking.copies(outcome.state)
    models = copies or {run.ids[0]: outcome.state.weights}
    scored = list(models)[:2]  # Of copies that are taught alike, two are scored.
    found: dict[str, Any] = {}
    for name, make in stolen(run, models).items():
        for client, tensors in make().items():
            verdict = marking.verify({n: tensors[n] for n in models[client]})
            told: dict[str, Any] = {
                "rate": verdict.rates[client if copies else verdict.who],
                "gap": verdict.gap,
                "claimed": verdict.verified,
                "right": verdict.claims == [client] if copies else verdict.verified,
                "claims": len(verdict.claims),
                "p_value": verdict.p_value,
            }
            if copies:
                told["next"] = max(rate for who, rate in verdict.rates.items() if who != client)
                told["wrong"] = len({*verdict.claims} - {client})
            if client in scored:
                told["accuracy"] = accuracy(run, tensors)
            found.setdefault(name, []).append(told)
    server = {"server": marking.verify(outcome.state.weights).to_json()} if copies else {}
    return {"seconds": seconds, "found": found, "sets": len(marking.key.content["keys"]), **server}


def plain(seed: int, scenario: str = SCENARIO) -> dict[str, Any]:
    """The same run without a watermark."""
    began = time.perf_counter()
    run = federation(scenario, seed, {"method": "fedavg"})
    weights = run.run().state.weights
    return {"seconds": time.perf_counter() - began, "accuracy": accuracy(run, weights)}


def strangers(seed: int) -> dict[str, Any]:
    """Matches of a model that was made without any key, with many keys; with a pattern for each mark, as here, and with
    one for each class, as in WAFFLE's paper, where all rows are counted."""
    run, suspect = stranger(seed)
    found: dict[str, list[int]] = {"each": [], "class": []}
    for number in range(KEYS):
        for name, patterns in (("each", 0), ("class", 4)):
            rate = 2.0**-64 if not patterns else 0.5  # Four trials claim at no small rate.
            marking = Marking(Waffle(patterns=patterns, false_positive=rate), run)
            run.secret = number
            rows = marking.key.content["keys"]["owner"]
            found[name].append(int(suspect.right(rows).sum()))
    return found


def traced(seed: int) -> dict[str, Any]:
    """Whom keys of DUW name for such a model: marks needed, and the matches of each client's set."""
    run, suspect = stranger(seed, ENOUGH)
    mark: DUW = parts.make("ownership", COPIES, "watermark")
    found: list[int] = []
    needed = 0
    for number in range(FEWER):
        run.secret = number
        verdict = DUW.verify(Marking(mark, run).key, suspect)
        needed = verdict.threshold
        found += [round(rate * verdict.marks) for rate in verdict.rates.values()]
    return {"matches": found, "needed": needed, "marks": mark.marks}


def stranger(seed: int, scenario: str = SCENARIO) -> tuple[Federation, Present]:
    """A model of other rows and weights that was trained without any key."""
    run = federation(scenario, seed, {"method": "fedavg"})
    weights = run.run().state.weights
    run.trainer.trunk = None  # It keeps what comes again, and these rows come once.
    return run, Present(run.trainer, weights, run.layout)


def measure(only: str) -> None:
    """All that is missing, of those whose name has ``only`` in it."""
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    jobs: dict[str, Callable[[], dict[str, Any]]] = {}
    for seed in SEEDS:
        jobs[f"plain {seed}"] = lambda seed=seed: plain(seed)
        for kind in MARKS:
            jobs[f"{kind} {seed}"] = lambda kind=kind, seed=seed: marked(MARKS[kind], seed)
        jobs[f"{ENOUGH}: plain {seed}"] = lambda seed=seed: plain(seed, ENOUGH)
        jobs[f"{ENOUGH}: duw {seed}"] = lambda seed=seed: marked(COPIES, seed, ENOUGH)
    for seed in STRANGERS:
        jobs |= {
            f"stranger {seed}": lambda seed=seed: strangers(seed),
            f"stranger traced {seed}": lambda seed=seed: traced(seed),
        }
    for name, job in jobs.items():
        if only in name and name not in found:
            found[name] = job()
            found["setting"], found[ENOUGH] = (SCENARIOS[name].describe() for name in (SCENARIO, ENOUGH))
            found["machine"], found["torch"] = machine(), torch.__version__
            write_json(RESULTS, found)
            print(name, flush=True)


def page(found: Mapping[str, Any]) -> str:
    """The tables."""

    def of(kind: str) -> list[dict[str, Any]]:
        return [found[f"{kind} {seed}"] for seed in SEEDS if f"{kind} {seed}" in found]

    def mean(values: Sequence[float]) -> str:
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.3f}{spread}"

    base = of("plain")
    lines = [
        f"{found['setting'][0].upper()}{found['setting'][1:]}; {len(base)} seeds, mean ± standard deviation; "
        "false claims at 2^-64. Made by `python -m benchmarks.fidelity.ownership`, numbers in",
        "[ownership.json](../benchmarks/fidelity/ownership.json).",
        "",
        "| watermark | accuracy | seconds of a run |",
        "|---|---|---|",
        f"| none | {mean([r['accuracy'] for r in base])} | {mean([r['seconds'] for r in base])} |",
    ]
    for kind in MARKS:
        if runs := of(kind):
            own = [statistics.fmean(accuracies(r["found"]["as it is"])) for r in runs]
            lines.append(f"| `{kind}` | {mean(own)} | {mean([r['seconds'] for r in runs])} |")
    lines += [
        "",
        "| watermark | the thief has it | marks matched | claimed | accuracy |",
        "|---|---|---|---|---|",
    ]
    for kind in MARKS:
        runs = of(kind)
        for name in runs[0]["found"] if runs else ():
            told = [t for r in runs for t in r["found"][name]]
            claims = f"{sum(t['right'] for t in told)} of {len(told)}"
            if kind.startswith("fedipr"):
                claims = f"{statistics.fmean(t['claims'] for t in told):.1f} of {runs[0]['sets']} signatures"
            rate = f"{100 * statistics.fmean(t['rate'] for t in told):.0f} %"
            lines.append(f"| `{kind}` | {name} | {rate} | {claims} | {mean(accuracies(told))} |")
    if copies := of(f"{ENOUGH}: duw"):
        base = of(f"{ENOUGH}: plain")
        scores = [statistics.fmean(accuracies(r["found"]["as it is"])) for r in copies]
        lines += [
            "",
            f"`duw` with {COPIES['marks']} marks for each client: {found[ENOUGH]}; runs: {len(copies)}. Copies have an "
            f"accuracy of {mean(scores)}, the model without marks {mean([r['accuracy'] for r in base])}.",
            "",
            "| the thief has its copy of `duw` | traced to the right client | whose marks match best | own marks, mean "
            "and least | the next client's, mean and most | others claimed |",
            "|---|---|---|---|---|---|",
        ]
        for name in copies[0]["found"]:
            told = [t for r in copies for t in r["found"][name]]
            best = sum(t["rate"] > t["next"] for t in told)
            cells = [f"{sum(t['right'] for t in told)} of {len(told)}", f"the right one's, {best} of {len(told)}"]
            for which, end in (("rate", min), ("next", max)):
                rates = [100 * t[which] for t in told]
                cells.append(f"{statistics.fmean(rates):.0f} %, {end(rates):.0f} %")
            lines.append(f"| {name} | {' | '.join(cells)} | {sum(t['wrong'] for t in told)} |")
        servers = [r["server"] for r in copies]
        lines += [
            "",
            f"The server's own model, which is nobody's copy, matches {max(s['matches'] for s in servers)} of "
            f"{servers[0]['marks']} marks of a client at most, where {servers[0]['threshold']} are needed.",
        ]
        if asked := [found[f"stranger traced {seed}"] for seed in STRANGERS if f"stranger traced {seed}" in found]:
            hits = [m for run in asked for m in run["matches"]]
            claimed = sum(m >= asked[0]["needed"] for m in hits)
            lines[-1] += (
                f" Of strangers' models, asked by {FEWER} keys of four clients each, {claimed} of {len(hits)} sets of "
                f"marks claim one: {statistics.fmean(hits):.1f} marks match on average and {max(hits)} at most."
            )
    if many := [found[f"stranger {seed}"] for seed in STRANGERS if f"stranger {seed}" in found]:
        each, alike = ([m for run in many for m in run[name]] for name in ("each", "class"))
        strict, loose = (threshold(100, 0.25, rate) for rate in (2.0**-64, LOOSE))
        lines += [
            "",
            f"False claims: models of other rows and weights, trained without a key ({len(many)} of them), were asked "
            f"by {KEYS} keys of 100 marks in 4 classes.",
            "",
            f"| patterns | mean | most | claimed at 2^-64 ({strict} needed) | at {LOOSE:g} ({loose} needed) |",
            "|---|---|---|---|---|",
        ]
        for name, hits in (("one for each mark (here)", each), ("one for each class, all rows counted", alike)):
            shares = [f"{sum(h >= t for h in hits)} of {len(hits)}" for t in (strict, loose)]
            lines.append(f"| {name} | {statistics.fmean(hits):.1f} | {max(hits)} | {' | '.join(shares)} |")
    return "\n".join(lines)


def accuracies(told: Sequence[Mapping[str, Any]]) -> list[float]:
    """Those that were measured."""
    return [one["accuracy"] for one in told if "accuracy" in one]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", action="store_true", help="only write the tables again")
    parser.add_argument("--only", default="", help="of what is missing, that whose name has this in it, such as duw")
    warnings.filterwarnings("ignore")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    asked = parser.parse_args()
    if not asked.page:
        measure(asked.only)
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{page(json.loads(RESULTS.read_text()))}\n{END}{after}")


if __name__ == "__main__":
    main()
