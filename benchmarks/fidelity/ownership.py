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

from benchmarks.fidelity.scenarios import SCENARIOS
from benchmarks.fidelity.trial import federation
from fedfm.core.client import View
from fedfm.core.jobs import Fit
from fedfm.core.update import Member, Tensors
from fedfm.federation import Federation
from fedfm.ownership import Waffle
from fedfm.ownership.chance import threshold
from fedfm.ownership.marking import Marking
from fedfm.results import machine
from fedfm.store.files import write_json

HERE = Path(__file__).parent
RESULTS = HERE / "ownership.json"
PAGE = HERE.parents[1] / "docs" / "ownership.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"

SCENARIO = "agnews-iid"
SEEDS = (1, 2)
COPIES = 4
"""Clients who leak theirs."""
MARKS: dict[str, dict[str, Any]] = {
    "waffle (renewal: 1)": {"kind": "waffle", "renewal": 1.0},
    "trigger-set-watermark": {"kind": "trigger-set-watermark"},
    "fedipr (strength: 5, margin: 0.1)": {"kind": "fedipr", "strength": 5.0, "margin": 0.1},
    "waffle": {"kind": "waffle"},
    "fedipr": {"kind": "fedipr"},
    "duw": {"kind": "duw", "marks": 48, "rate": 3.0},
}
"""With 48 marks instead of 100 a round of DUW takes half as long; four classes at 2^-64 for eight clients need 34."""
SHORT = {"rounds": 3}
"""DUW teaches eight copies in every round: of that, one seed and few rounds, beside the same without it."""
STRANGERS = (11,)
"""Seeds of models that are trained without a key, of rows and weights of their own."""
KEYS = 20
"""Keys that each of them is asked by."""
LOOSE = 0.01
"""A rate of false claims that so few trials can see."""


def changed(run: Federation, weights: Tensors) -> dict[str, Callable[[], Tensors]]:
    """What a thief makes of a model, by name. It has the training rows of one client."""
    thief = run.ids[0]
    examples = run.plan.members.member(thief).examples
    epoch = -(-examples // run.plan.training.per_device_train_batch_size)

    def tuned(rate: float) -> Tensors:
        job = Fit(weights, train=run.method.train, max_steps=5 * epoch, rate=rate, purpose="theft")
        return run.trainer.answer(job, View(Member(thief, examples), 1, space=run.layout)).tensors

    return {
        "as it is": lambda: weights,
        "fine-tuned": lambda: tuned(1.0),
        "fine-tuned gently": lambda: tuned(0.1),
        "pruned 30 %": lambda: pruned(weights, 0.3),
        "pruned 60 %": lambda: pruned(weights, 0.6),
    }


def pruned(weights: Tensors, share: float) -> Tensors:
    """Each tensor without that share of its entries that are smallest in size."""
    return {n: torch.where(t.abs() >= t.abs().flatten().float().quantile(share), t, 0.0) for n, t in weights.items()}


def accuracy(run: Federation, weights: Tensors) -> float:
    """Over all test rows, of one model for all."""
    plain = run.like(run.method)
    found = plain.assess(replace(plain.start(), weights=weights))
    assert found is not None
    return found.pooled["accuracy"]


def marked(kind: str, seed: int) -> dict[str, Any]:
    """A run with a watermark, and what is left of it after each change."""
    began = time.perf_counter()
    less = SHORT if kind == "duw" else {}
    run = federation(SCENARIO, seed, {"method": "fedavg", "watermark": MARKS[kind], **less})
    outcome = run.run()
    seconds, marking = time.perf_counter() - began, run.marking
    assert marking is not None
    own = marking.copies(outcome.state) or {"": outcome.state.weights}
    found: dict[str, Any] = {}
    for client, weights in list(own.items())[:COPIES]:
        for name, make in changed(run, weights).items():
            tensors = make()
            verdict = marking.verify({n: tensors[n] for n in weights})
            told: dict[str, Any] = {"rate": verdict.rates[client or verdict.who], "gap": verdict.gap}
            # Of copies that are taught alike, two are scored.
            told |= {"accuracy": accuracy(run, tensors)} if client in ("", *list(own)[:2]) else {}
            told |= {"claimed": verdict.verified, "right": verdict.claims == [client] if client else verdict.verified}
            told |= {"claims": len(verdict.claims), "p_value": verdict.p_value}
            found.setdefault(name, []).append(told)
    return {"seconds": seconds, "found": found, "sets": len(marking.key.content["keys"])}


def plain(seed: int, **less: Any) -> dict[str, Any]:
    """The same run without a watermark."""
    began = time.perf_counter()
    run = federation(SCENARIO, seed, {"method": "fedavg", **less})
    weights = run.run().state.weights
    return {"seconds": time.perf_counter() - began, "accuracy": accuracy(run, weights)}


def strangers(seed: int) -> dict[str, Any]:
    """Matches of a model that was made without any key, with many keys; with a pattern for each mark, as here, and with
    one for each class, as in WAFFLE's paper, where all rows are counted."""
    run = federation(SCENARIO, seed, {"method": "fedavg"})
    weights = run.run().state.weights
    run.trainer.trunk = None  # It keeps what comes again, and these rows come once.
    found: dict[str, list[int]] = {"each": [], "class": []}
    for number in range(KEYS):
        for name, patterns in (("each", 0), ("class", 4)):
            rate = 2.0**-64 if not patterns else 0.5  # Four trials claim at no small rate.
            marking = Marking(Waffle(patterns=patterns, false_positive=rate), run)
            run.secret = number
            rows = marking.key.content["keys"]["owner"]
            found[name].append(int(_suspect(run, weights).right(rows).sum()))
    return found


def _suspect(run: Federation, weights: Tensors) -> Any:
    from fedfm.ownership.suspect import Present

    return Present(run.trainer, weights, run.layout)


def measure() -> None:
    """All that is missing."""
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    jobs: dict[str, Callable[[], dict[str, Any]]] = {}
    for seed in SEEDS:
        jobs[f"plain {seed}"] = lambda seed=seed: plain(seed)
        for kind in MARKS:
            if kind != "duw":
                jobs[f"{kind} {seed}"] = lambda kind=kind, seed=seed: marked(kind, seed)
    jobs |= {"short 1": lambda: plain(SEEDS[0], **SHORT), f"duw {SEEDS[0]}": lambda: marked("duw", SEEDS[0])}
    jobs |= {f"stranger {seed}": lambda seed=seed: strangers(seed) for seed in STRANGERS}
    for name, job in jobs.items():
        if name not in found:
            found[name] = job()
            found["setting"] = SCENARIOS[SCENARIO].describe()
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
            if kind == "duw":
                short = found["short 1"]
                lines.append(f"| none, {SHORT['rounds']} rounds | {short['accuracy']:.3f} | {short['seconds']:.0f} |")
                kind = f"duw`, {SHORT['rounds']} rounds`"
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
            what = "right client" if kind == "duw" else "claimed"
            claims = f"{sum(t['right'] for t in told)} of {len(told)} ({what})"
            if kind.startswith("fedipr"):
                claims = f"{statistics.fmean(t['claims'] for t in told):.1f} of {runs[0]['sets']} signatures"
            rate = f"{100 * statistics.fmean(t['rate'] for t in told):.0f} %"
            lines.append(f"| `{kind}` | {name} | {rate} | {claims} | {mean(accuracies(told))} |")
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
    warnings.filterwarnings("ignore")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if not parser.parse_args().page:
        measure()
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{page(json.loads(RESULTS.read_text()))}\n{END}{after}")


if __name__ == "__main__":
    main()
