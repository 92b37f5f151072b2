"""One run of a method in a scenario: its scores and what it cost; kept, so that it is not run twice."""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
import statistics
import tempfile
from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

import fedfm
from benchmarks.fidelity import theft
from benchmarks.fidelity.claim import Score
from benchmarks.fidelity.scenarios import LIAR, SCENARIOS
from fedfm import parts
from fedfm.core.plan import Training
from fedfm.errors import FedfmError
from fedfm.evaluate import Assessment, Evaluation
from fedfm.federation import Federation
from fedfm.models import load
from fedfm.results import totals
from fedfm.rounds import peak_memory_mb
from fedfm.spaces.space import Space
from fedfm.store.clients import ClientStore
from fedfm.store.files import write_json
from fedfm.train.bench import Bench

SEEDS = (1, 2, 3)
"""None of them is 0, with which the learning rates of the scenarios were chosen."""

FOLDERS = {
    "method": "methods",
    "space": "spaces",
    "task": "tasks",
    "sampler": "sample",
    "rule": "rules",
    "mean": "robust",
    "schedule": "schedule",
    "stages": "wire",
    "screens": "robust",
    "audits": "value",
    "privacy": "privacy",
    "threat": "attack",
    "secure": "secure",
    "watermark": "ownership",
}
"""Where the parts behind each argument of ``Federation`` lie."""


def federation(scenario: str, seed: int, changes: Mapping[str, Any]) -> Federation:
    """The clients of a scenario; ``changes`` replace what it says, and single settings of training and space."""
    setup = SCENARIOS[scenario]
    arguments: dict[str, Any] = {**setup.settings, **changes}
    for name in ("training", "space"):
        before, now = setup.settings[name], changes.get(name)
        if isinstance(before, Mapping) and isinstance(now, Mapping) and "kind" not in now:
            arguments[name] = {**before, **now}
    for name, folder in FOLDERS.items():
        if isinstance(spec := arguments.get(name), (list, tuple)):
            arguments[name] = tuple(parts.make(folder, s, name) for s in spec)
        elif spec is not None:
            arguments[name] = parts.make(folder, spec, name)
    arguments["training"] = parts.build(Training, arguments["training"], "training")
    clients = {"model": setup.model, "load": {}, **setup.make(seed)}
    head = arguments["task"].head
    model = bench(clients.pop("model"), head, tuple(clients.pop("load").items()), arguments["space"], seed)
    return Federation(model, **clients, **arguments, evaluation=Evaluation(every=0), seed=seed)


@lru_cache(maxsize=len(SEEDS))
def bench(model: str, head: str, options: tuple[tuple[str, Any], ...], space: Space, seed: int) -> Bench:
    """A model in memory for the methods that follow each other, with what its frozen blocks gave for each row."""
    return Bench.of(load(model, head=head, seed=seed, **dict(options)), space, seed)


def trial(scenario: str, seed: int, changes: Mapping[str, Any]) -> Score:
    """Run it and score every client's model on its test rows."""
    ready = federation(scenario, seed, changes)
    forget_peak()
    with tempfile.TemporaryDirectory(prefix="fedfm-fidelity-") as folder:
        outcome = ready.run(Path(folder) / "run")
        kept = ClientStore(Path(folder) / "run" / "clients")
        found = ready.assess(outcome.state, store=kept)
        success = ready.probe(outcome.state, store=kept)
        marks = theft.told(ready, outcome.state) if ready.marking else {}
    cost = totals(outcome)
    return {
        **scores(found),
        **({} if success is None else {"attack_success": success}),
        **marks,
        **{n: cost[n] for n in ("bytes_up", "bytes_down", "seconds", "client_memory")},
        "memory_mb": peak(),
    }


def scores(found: Assessment | None) -> Score:
    """Metrics over all test rows and, with ``mean`` before the name, over clients that count the same."""
    if found is None:
        raise FedfmError("no client has test rows, so there is nothing to score.")
    honest = [c for c in found.clients if not c.startswith(LIAR)]
    out: Score = {}
    for name in ("accuracy", "loss", "wer"):
        if values := [found.clients[c][name] for c in honest if name in found.clients[c]]:
            out[name] = statistics.fmean(values, [found.examples[c] for c in honest])
            out[f"mean {name}"] = statistics.fmean(values)
    return {name: value if math.isfinite(value) else None for name, value in out.items()}


def forget_peak() -> None:
    """Let the largest resident memory be counted from now on, where the system offers that."""
    gc.collect()
    if os.access(reset := "/proc/self/clear_refs", os.W_OK):
        Path(reset).write_text("5")


def peak() -> int:
    """Largest resident memory in MB since :func:`forget_peak`, or of the process so far."""
    if not (status := Path("/proc/self/status")).exists():
        return peak_memory_mb()
    line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
    return round(int(line.split()[1]) * 1024 / 1e6)


@cache
def source() -> str:
    """Digest of the code that decides what a run gives."""
    files = [*Path(fedfm.__file__).parent.rglob("*.py"), Path(__file__).with_name("scenarios.py")]
    digest = hashlib.sha256(torch.__version__.encode())
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def kept(folder: Path, scenario: str, seed: int, changes: Mapping[str, Any]) -> Score:
    """The run as an earlier command left it in ``folder``, or a new one."""
    about = json.dumps([source(), scenario, SCENARIOS[scenario].describe(), seed, changes], sort_keys=True)
    place = folder / f"{hashlib.sha256(about.encode()).hexdigest()[:24]}.json"
    if not place.exists():
        write_json(place, trial(scenario, seed, changes))
    score: Score = json.loads(place.read_text())
    return score
