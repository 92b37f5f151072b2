"""Attacks against defences on a real model: every threat against what a server can do about it, measured.

    PYTHONPATH=src:. python -m benchmarks.fidelity.attacks [--rounds 6] [--seed 1]

writes ``attacks.json`` beside this file, cell by cell, and the table in ``docs/attacks-measured.md``. A run that was
ended goes on with the cells that are missing; ``--page`` writes the table of those that are there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.fidelity.scenarios import HEADLINES, classes, headlines, lied
from benchmarks.fidelity.trial import bench
from fedfm import parts
from fedfm.attack.threat import Threat
from fedfm.core.plan import Training
from fedfm.evaluate import Evaluation
from fedfm.federation import Federation
from fedfm.matrix import NONE, Matrix
from fedfm.methods.fedavg import FedAvg
from fedfm.parts import Spec
from fedfm.results import machine
from fedfm.sample import Uniform
from fedfm.spaces import Space

HERE = Path(__file__).parent
RESULTS = HERE / "attacks.json"
PAGE = HERE.parents[1] / "docs" / "attacks-measured.md"

CLIENTS, SHARE, EACH = 10, 0.2, 48
TRAINING = {**HEADLINES["training"], "learning_rate": 6e-3}
FIRST = frozenset(
    {NONE, "krum", "median", "flame", "foolsgold"}
    | {"sign-flip", "badnets", "min-max", "model-replacement", "pga", "proattack", "cerp"}
)
"""What is run first, where there is no time for all."""
TARGET = {"target": 2, "share": 0.5}
ATTACKS: tuple[Spec, ...] = (
    "free-rider",
    "label-flip",
    "sign-flip",
    {"kind": "gaussian-attack", "std": 1.0},
    # By the paper's formula two of ten have z = 0; 1.5 is what is often taken.
    {"kind": "alie", "z": 1.5, "sees": "omniscient"},
    "min-max",
    "min-sum",
    "fang-trimmed-mean",
    "fang-krum",
    {"kind": "badnets", **TARGET},
    {"kind": "dba", **TARGET},
    {"kind": "model-replacement", **TARGET},
    {"kind": "fed-ebd", **TARGET},
    "pga",
    # Few rows of a hostile client are of the class: all of them.
    {"kind": "proattack", "target": 2, "share": 1.0},
    # With the weights of the authors' code, for whole models and SGD, the terms would do nothing here.
    {"kind": "cerp", **TARGET, "alpha": 0.1, "beta": 0.5},
)
DEFENCES: tuple[Spec, ...] = (
    {"kind": "clip", "max_norm": 1.0},
    "median",
    {"kind": "trimmed-mean", "fraction": 0.2},
    "krum",
    "multi-krum",
    "geometric-median",
    {"kind": "norm-bounding", "max_norm": 1.0},
    {"kind": "centered-clipping", "radius": 1.0},
    "foolsgold",
    "flame",
    "fltrust",
    "zeno",
    "lfr",
    "tdfl",
    "sageflow",
    "fed-fa",
    # A few of 34 rows, where the paper's clients give a few of thousands.
    {"kind": "diversefl", "share": 0.25},
    "outlier-update-detector",
)
ONE_BY_ONE: tuple[Spec, ...] = ("zenopp",)
"""Defences that take uploads when they arrive: of them a round is one upload, so they have as many more rounds."""


def alone(attack: Spec) -> bool:
    """Whether an attack needs no uploads of others, so that it can be tried where nobody waits for anybody."""
    threat: Threat = parts.make("attack", attack, "attacks")
    return threat.knowledge == "local"


def main_federation(seed: int, rounds: int) -> Federation:
    """The clients without anybody hostile."""
    made = lied(CLIENTS, 0, EACH)(seed)
    space: Space = parts.make("spaces", HEADLINES["space"], "space")
    task = parts.make("tasks", HEADLINES["task"], "task")
    model = bench(made["model"], task.head, tuple(classes(headlines())["load"].items()), space, seed)
    return Federation(
        model,
        FedAvg(),
        made["members"],
        task,
        space=space,
        training=parts.build(Training, TRAINING, "training"),
        rounds=rounds,
        sampler=Uniform(fraction=1.0),
        public=made["public"],
        evaluation=Evaluation(every=0),
        seed=seed,
    )


def measure(seed: int, rounds: int) -> None:
    """Run every cell that is not there yet; each is written down when it is done."""
    table = Matrix(main_federation(seed, rounds), ATTACKS, DEFENCES)
    later = Matrix(main_federation(seed, rounds * CLIENTS), [a for a in ATTACKS if alone(a)], ONE_BY_ONE)
    columns = {kind(spec) for spec in ONE_BY_ONE}
    runs = table.runs() | {name: run for name, run in later.runs().items() if name.split("+")[1] in columns}
    settings = {
        "attacks": list(ATTACKS),
        "defences": [*DEFENCES, *ONE_BY_ONE],
        "training": TRAINING,
        "rounds": rounds,
        "seed": seed,
    }
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    cells = known(before, json.loads(json.dumps(settings)))
    bases = unpoisoned(runs, {a: v for a, v in before.get("bases", {}).items() if f"{a}+{NONE}" in cells})
    spent = before["processor_seconds"] if cells else 0.0
    for name in order(runs):
        if name in cells:
            continue
        began, run = time.process_time(), runs[name]
        state = run.run().state
        shown = table.table(runs, {name: run.assess(state)}, {name: run.probe(state)})
        cells[name] = shown["cells"][name]
        spent += time.process_time() - began
        found = {
            **shown,
            "defences": [NONE, *map(kind, [*DEFENCES, *ONE_BY_ONE])],
            "cells": cells,
            "bases": bases,
            "settings": settings,
            "data": f"{headlines().about}, {CLIENTS} clients dealt by chance, {EACH} rows each",
            "processor_seconds": round(spent, 1),
            "machine": machine(),
            "torch": torch.__version__,
        }
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{name:<32} {cells[name]}", flush=True)


def unpoisoned(runs: Mapping[str, Federation], before: Mapping[str, float]) -> dict[str, float]:
    """By attack, how often a model that nobody attacked gives the answer that is wanted where the trigger is."""
    aimed = {
        name.removesuffix(f"+{NONE}"): run
        for name, run in runs.items()
        if name.endswith(f"+{NONE}") and run.threat and run.threat.targeted
    }
    found = {attack: before[attack] for attack in aimed if attack in before}
    if found.keys() != aimed.keys():
        state = runs[f"{NONE}+{NONE}"].run().state
        found |= {a: share for a, run in aimed.items() if a not in found and (share := run.probe(state)) is not None}
    return found


def known(before: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The cells of an earlier table whose attack and defence are set as they are now."""
    then = before.get("settings", {})
    if any(then.get(name) != settings[name] for name in ("training", "rounds", "seed")):
        return {}
    same = {kind(spec) for side in ("attacks", "defences") for spec in then[side] if spec in settings[side]} | {NONE}
    return {name: cell for name, cell in before["cells"].items() if same.issuperset(name.split("+"))}


def kind(spec: Spec) -> str:
    """The id in a spec."""
    return spec if isinstance(spec, str) else str(spec["kind"])


def order(names: Iterable[str]) -> list[str]:
    """The cells of the attacks and defences in ``FIRST`` before the others."""
    return sorted(names, key=lambda name: sum(word not in FIRST for word in name.split("+")))


def page(found: Mapping[str, Any]) -> str:
    """The table as Markdown."""
    settings, cells, columns = found["settings"], found["cells"], found["defences"]

    def row(first: str, values: Sequence[str]) -> str:
        return f"| {first} | {' | '.join(values)} |"

    def block(key: str, rows: Sequence[str], write: Any) -> list[str]:
        head = [row("attack", columns), "|---|" + "---:|" * len(columns)]
        values = [[cells.get(f"{a}+{d}", {}).get(key) for d in columns] for a in rows]
        shown = [["not run" if v is None else write(v) for v in line] for line in values]
        return [*head, *(row(f"`{a}`", line) for a, line in zip(rows, shown, strict=True)), ""]

    tried = [a for a in found["attacks"] if any(f"{a}+{d}" in cells for d in columns)]
    aimed = [a for a in tried if any(cells.get(f"{a}+{d}", {}).get("attack_success") is not None for d in columns)]
    given = [spec if isinstance(spec, str) else json.dumps(spec) for spec in settings["attacks"] + settings["defences"]]
    return "\n".join(
        [
            "# Attacks against defences, measured",
            "",
            "Made by `python -m benchmarks.fidelity.attacks`; the numbers are in",
            "[attacks.json](../benchmarks/fidelity/attacks.json). How to make such a table of your own:",
            "[attacks.md](attacks.md).",
            "",
            f"{found['data']}; all-minilm-l6-v2, LoRA of rank 4 on the last block and a new head; FedAvg, all clients "
            f"in each of {settings['rounds']} rounds, 4 AdamW steps a round; one seed ({settings['seed']}). "
            f"{round(SHARE * CLIENTS)} of {CLIENTS} clients are hostile in all rounds, those of `fed-ebd` none. "
            f"{found['processor_seconds'] / 60:.0f} minutes of processor time.",
            "",
            f"## {found['metric'].capitalize()} of the mean honest client on held-out rows",
            "",
            *block("quality", tried, lambda v: f"{v:.3f}"),
            "## Success of attacks with an aim: share of held-out rows with the trigger given the attacker's class",
            "",
            *block("attack_success", aimed, lambda v: f"{100 * v:.0f} %"),
            "Of the model that nobody attacked, by chance or because the trigger itself says something: "
            + ", ".join(f"`{attack}` {100 * share:.0f} %" for attack, share in found["bases"].items())
            + ".",
            "",
            "## What is to be read from it, and what not",
            "",
            *READING,
            "",
            "Settings, where they are not the defaults: " + ", ".join(f"`{g}`" for g in given) + ".",
            "",
        ]
    )


READING: tuple[str, ...] = (
    "- One seed, few rounds and 136 held-out rows: a cell is good to about 0.04 of accuracy or 5 % of success, and",
    "  differences below that say nothing. No paper's claim is judged by this table.",
    "- What says `not run` was left out for time. Attacks that look at others' uploads are refused with `zenopp`.",
    "- The mean falls to guessing by uploads turned around or random (`sign-flip`, `gaussian-attack`); all defences",
    "  but `foolsgold` and `sageflow` keep most of what there is to keep. Swapped classes (`label-flip`) cost the mean",
    "  a fifth.",
    "- `fang-krum`, which is made for Krum, makes Krum guess and harms the mean no more than free riders do: what",
    "  bears one attack invites another. Krum also takes two free riders who send the same nothing for the heart of",
    "  the crowd.",
    "- A backdoor by rows (`badnets`, `dba`) passes the mean, the median and the trimmed mean. Krum, which takes one",
    "  upload alone, halves it; its price shows in the row without an attack. Half of the hostile rows are poisoned.",
    "  An enlarged backdoor (`model-replacement`) is easier to see: `multi-krum`, `zeno` and `flame` stop most of it.",
    "- `zeno` and `lfr`, which try uploads out on public rows, bear what makes the model worse; both leave two uploads",
    "  out where nobody is hostile, too. `foolsgold` is made for hostile clients who are alike, and bears those who",
    "  poison rows alone; against noise and turned uploads it does nothing.",
    "- `fltrust` learns less than the mean without an attack. Its weights are cosines to the server's own update, and",
    "  of four AdamW steps on a few rows these are little more than noise: 0.08 on average between an honest upload",
    "  and the server's in the first round, -0.03 in the last, when three honest uploads of ten were taken.",
    "- `pga` goes up as far as honest clients go down, costs the mean more than a third, and passes what bounds",
    "  lengths or takes middles. `krum`, `multi-krum`, `zeno`, `fed-fa` and `diversefl` bear it; `lfr` does not.",
    "- `proattack` changes no class and costs nothing: with two of ten clients, who have some eight rows of the class",
    "  each, its prompt means the class in 31 % of rows, against 17 % where nobody was hostile. `flame`, which leaves",
    "  out honest uploads, makes that 48 %.",
    "- Of the success of `cerp` most is found, not taught: words that are searched for by what the model answers get",
    "  the wanted class in three of four rows of a model that nobody attacked. What is taught on top, a tenth, passes",
    "  `multi-krum` and `flame` whole, which stop a part of `badnets`; `krum` and `fed-fa` leave little of it. With",
    "  `foolsgold`, which stops `badnets`, it is 98 %: the uploads of `cerp` are made to be unlike each other, which",
    "  is what `foolsgold` takes for honest.",
    "- `sageflow` is the worst here. Its threshold, 1 nat, is the paper's for ten classes; of four, honest models are",
    "  as unsure as 1.2 to 1.4 nats up to the fourth round, and those of hostile clients, who turn or enlarge what",
    "  they send, are sure first: in rounds 2 to 4 of `sign-flip` no honest upload was kept.",
    "- `outlier-update-detector` stops what is long and little else. `fed-fa` halves a backdoor by rows, too.",
    "  `diversefl`, with guiding updates of eight rows, left nobody out for the poisoned rows of `badnets`: such",
    "  uploads go the way of the clean rows, as well.",
    "- `zenopp` takes a tenth of an upload's step at a time, sixty of them, and has not learnt as much by then.",
    "- No defence at the server sees a compromised foundation model (`fed-ebd`): all clients are honest and carry it.",
    "- `alie`, `min-max` and `min-sum` do little with two of ten clients dealt by chance, whose uploads hardly differ.",
    "  They are made for more hostile clients and for clients with rows of their own sort.",
    "- An earlier table here was of ten clients who all had wrong labels: none of the clients was to lie, and all did.",
    "  That is why `lfr` and `fltrust`, whose public rows were right, did so badly in it.",
)


def main() -> None:
    """Measure, or with ``--page`` only write the page again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--page", action="store_true")
    given = parser.parse_args()
    if not given.page:
        measure(given.seed, given.rounds)
    PAGE.write_text(page(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
