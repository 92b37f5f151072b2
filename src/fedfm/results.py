"""What came of a recipe: its runs compared on held-out rows, samples of text, totals."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedfm.core import seeds, trees
from fedfm.core.method import State
from fedfm.evaluate.assessment import Assessment
from fedfm.rounds import Outcome
from fedfm.store.clients import ClientStore

if TYPE_CHECKING:
    from fedfm.experiment import Experiment


def results(experiment: Experiment, outcomes: Mapping[str, Outcome], places: Mapping[str, Path]) -> dict[str, Any]:
    """The content of ``results.json``: the comparison of all runs on the clients' test splits, with samples and totals.

    Args:
        experiment: whose runs they are.
        outcomes: of all its runs, by name.
        places: the folder of each.
    """
    main = experiment.main
    initial = main.start()
    tests, success = {"base": main.assess(initial)}, {"base": main.probe(initial)}
    for name, outcome in outcomes.items():
        store = ClientStore(places[name] / "clients")
        tests[name] = experiment.runs[name].assess(outcome.state, store=store)
        success[name] = experiment.runs[name].probe(outcome.state, store=store)
    model, space = main.bench.loaded, main.bench.space
    return {
        "status": "completed",
        "title": experiment.recipe.title or experiment.recipe.name,
        "model": model.name,
        "method": main.method.id,
        "task": main.task.id,
        "primary": "loss",
        "parameters": {
            "total": sum(p.numel() for p in model.model.parameters()),
            "trainable": trees.count(trees.select(space.initial, main.method.train)),
            "shared": trees.count(trees.select(space.initial, main.method.share)),
        },
        "runs": {name: totals(outcome) for name, outcome in outcomes.items()},
        "test": {name: test.to_json() if test else None for name, test in tests.items()},
        **({"threat": main.attack.to_json()} if main.attack else {}),
        **({"attack_success": success} if any(share is not None for share in success.values()) else {}),
        **({"watermark": main.marking.results(outcomes[main.method.id].state)} if main.marking else {}),
        **_table(experiment, tests, success),
        "samples": samples(experiment, outcomes[main.method.id].state),
        "final": "final" if main.result(outcomes[main.method.id].state) else None,
        "versions": {p: version(p) for p in ("fedfm", "torch", "transformers", "peft")}
        | {"python": platform.python_version()},
        "machine": machine(),
    }


def _table(
    experiment: Experiment, tests: Mapping[str, Assessment | None], success: Mapping[str, float | None]
) -> dict[str, dict[str, Any]]:
    """The table of attacks against defences, if there is one."""
    if not experiment.matrix:
        return {}
    main = experiment.main
    alias = {name: main.method.id if run is main else name for name, run in experiment.cells.items()}
    found = {name: tests.get(run) for name, run in alias.items()}
    given = {name: success.get(run) for name, run in alias.items()}
    return {"matrix": experiment.matrix.table(experiment.cells, found, given)}


def samples(experiment: Experiment, after: State) -> list[dict[str, str]]:
    """Answers to some held-out prompts by the model before and after training."""
    main = experiment.main
    if not (main.task.head == "causal_lm" and experiment.recipe.samples and main.result(after)):
        return []
    rows: list[tuple[str, Any]] = []
    order = seeds.numpy_generator(experiment.recipe.seed, "samples").permutation(len(main.ids))
    for position in order:
        client = main.ids[int(position)]
        if len(rows) < experiment.recipe.samples and len(held := experiment.population.rows(client, "test")):
            rows.append((client, held[0]))
    prompts = [main.task.prompt(row) for _, row in rows]
    before, later = experiment.generate({}, prompts), experiment.generate(main.result(after), prompts)
    return [
        {"client": c, "prompt": p, "reference": main.task.answer(row), "before": b, "after": a}
        for (c, row), p, b, a in zip(rows, prompts, before, later, strict=True)
    ]


def totals(outcome: Outcome) -> dict[str, Any]:
    """What a run cost."""
    rounds = [r for r in outcome.records if r["round"] > 0]
    work = [p for r in rounds for p in r["participants"].values()]
    return {
        "rounds": len(rounds),
        "seconds": round(sum(r["seconds"] for r in rounds), 3),
        "bytes_up": sum(r["bytes_up"] for r in rounds),
        "bytes_down": sum(r["bytes_down"] for r in rounds),
        "peak_memory_mb": max(r["peak_memory_mb"] for r in rounds),
        "client_memory": max((p.get("memory", 0) for p in work), default=0),
        "aggregation_error": max((r["aggregation_error"] for r in rounds if "aggregation_error" in r), default=None),
        "steps": sum(p["steps"] for p in work),
        "dropped": sum(len(r["dropped"]) for r in rounds),
    }


def machine() -> dict[str, Any]:
    """The machine's processor, cores and memory."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": cpu, "cores": os.cpu_count(), "memory_gb": round(memory / 1e9, 1)}
