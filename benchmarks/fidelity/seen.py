"""Who sees what: what arrives at the server in each configuration, held against what its clients computed.

    PYTHONPATH=src:. python -m benchmarks.fidelity.seen

runs a round of a small federation for each configuration, writes ``seen.json`` beside this file and the page
``docs/threat-model.md``. Nothing of the page's tables is written by hand: what arrived is that of the transcript at the
link, and what a client computed is its upload in the same round of a run without protection.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from benchmarks.fidelity.scenarios import HEADLINES, classes, headlines, lied
from benchmarks.fidelity.trial import bench
from fedfm import parts
from fedfm.audit.watch import Watched, watch
from fedfm.core import trees
from fedfm.core.plan import Training
from fedfm.core.update import Tensors
from fedfm.evaluate import Evaluation
from fedfm.federation import Federation
from fedfm.recipe import parse
from fedfm.report.protection import hidden
from fedfm.results import machine
from fedfm.secure.fixed_point import Ring
from fedfm.secure.letters import MARK

HERE = Path(__file__).parent
READING = HERE / "seen.md"
"""What is said below the table; lines of tables in it cannot be broken."""
RESULTS = HERE / "seen.json"
PAGE = HERE.parents[1] / "docs" / "threat-model.md"
CLIENTS, EACH, SEED = 8, 32, 1
CLIP = {"kind": "clip", "max_norm": 0.5}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "topk": {"stages": [{"kind": "topk", "fraction": 0.1}]},
    "qsgd": {"stages": ["qsgd"]},
    "clip": {"stages": [CLIP]},
    "clip, gaussian": {"stages": [CLIP, {"kind": "gaussian", "noise_multiplier": 1.0, "delta": 1e-2}]},
    "clip, local-gaussian": {"stages": [CLIP, {"kind": "local-gaussian", "std": 0.01}]},
    "dp-sgd": {"privacy": {"kind": "dp-sgd", "noise_multiplier": 1.0, "max_grad_norm": 1.0, "delta": 1e-2}},
    "secagg": {"secure": {"kind": "secagg", "max_value": 0.1}},
    "secagg-plus": {"secure": {"kind": "secagg-plus", "max_value": 0.1}},
    "secagg; clip, gaussian": {
        "secure": {"kind": "secagg", "max_value": 0.1, "max_weight": 1},
        "stages": [CLIP, {"kind": "gaussian", "noise_multiplier": 1.0, "delta": 1e-2}],
    },
    "secagg; adaptive-clip, gaussian": {
        "secure": {"kind": "secagg", "max_value": 0.1, "max_weight": 1},
        "stages": ["adaptive-clip", {"kind": "gaussian", "noise_multiplier": 1.0, "delta": 1e-2}],
    },
    "secagg; clip, distributed-gaussian": {
        "secure": "secagg",
        "stages": [CLIP, {"kind": "distributed-gaussian", "noise_multiplier": 1.0, "delta": 1e-2}],
    },
    "smpc-additive": {"secure": {"kind": "smpc-additive", "max_value": 0.1}},
    "securefl": {"secure": "securefl"},
    "ckks": {"secure": {"kind": "ckks", "max_value": 0.1}},
    "fedml-he": {"secure": {"kind": "fedml-he", "max_value": 0.1}},
    "method nbafl": {"method": {"kind": "nbafl", "max_norm": 2.0}},
    "method local-only": {"method": "local-only"},
}
"""What is changed of the recipe, by name."""


def federation(changes: Mapping[str, Any]) -> Federation:
    """The clients with a configuration."""
    made = lied(CLIENTS, 0, EACH)(SEED)
    space = parts.make("spaces", HEADLINES["space"], "space")
    task = parts.make("tasks", HEADLINES["task"], "task")
    model = bench(made["model"], task.head, tuple(classes(headlines())["load"].items()), space, SEED)
    data = {
        "source": "digits",
        "partition": {"kind": "iid", "num_clients": CLIENTS},
    }  # The clients are given; a recipe wants to be whole.
    recipe = parse({"model": "all-minilm-l6-v2", "task": task.id, "data": data, **changes})
    built = recipe.built() | {
        "task": task,
        "space": space,
        "training": parts.build(Training, HEADLINES["training"], "training"),
        "rounds": 2,
        "evaluation": Evaluation(every=0),
        "seed": SEED,
        "public": made["public"],
    }
    return Federation(model, members=made["members"], **built)


def flat(tensors: Tensors, like: Sequence[str]) -> torch.Tensor:
    """The values of tensors in an order of names, ``[d]``."""
    return torch.cat([tensors[name].double().flatten() for name in like])


def likeness(one: torch.Tensor, other: torch.Tensor) -> float:
    """The cosine of two vectors; 0 where one of them is nothing."""
    size = float(one.norm() * other.norm())
    return float(one @ other) / size if size > 0 else 0.0


def arrived(watched: Watched, like: Sequence[str]) -> dict[str, torch.Tensor]:
    """By client, the vector that a server can make of what came from it, ``[d]``; nothing where it is no such vector.

    Of masked bytes and of a share it makes the integers that they spell, which is the best reading that there is; of
    ciphertexts nothing. Where coordinates are in the open beside them, the others are 0.
    """
    phase, found = watched.federation.method.phases[-1], {}
    size = sum(t.numel() for t in watched.federation.layout.initial.values())
    if watched.single:
        for one in watched.exposed():
            if set(like) <= set(one.change):
                found[one.clients[0]] = flat(one.change, like)
        return found
    for heard in watched.heard:
        if heard.phase == phase:
            sealed = [heard.update.tensors.get(f"{MARK}{name}") for name in ("masked", "share")]
            for packed in filter(lambda one: one is not None, sealed):
                found[heard.member] = _numbers(packed)[:size]  # What travels beside the upload comes last.
            if (packed := heard.update.tensors.get(f"{MARK}plain")) is not None:
                bits = np.unpackbits(heard.message[f"{MARK}mask"].numpy())
                plain = torch.from_numpy(bits[: len(packed) + int(bits.sum())] == 0)
                found[heard.member] = torch.zeros(len(plain), dtype=torch.float64)
                found[heard.member][plain] = _numbers(packed)
    return found


def _numbers(packed: torch.Tensor) -> torch.Tensor:
    """The integers that bytes spell."""
    ring = Ring(packed.shape[1])
    return torch.from_numpy(ring.signed(ring.unpack(packed.numpy())).astype(np.float64))


def measure(
    name: str, changes: Mapping[str, Any], truth: Mapping[str, torch.Tensor], like: Sequence[str]
) -> dict[str, Any]:
    """What the server saw in the first round of a configuration.

    Args:
        name: of the configuration.
        changes: it.
        truth: by client, what it computed where nothing protects it, ``[d]``.
        like: the order of the names.
    """
    run = federation(changes)
    watched = watch(run, 1)
    phase = run.method.phases[-1]
    heard = [h for h in watched.heard if h.phase == phase and h.update.tensors]
    found = arrived(watched, like)
    itself = {c: {o: abs(likeness(vector, truth[o])) for o in truth} for c, vector in found.items()}
    own = fmean(itself[c][c] for c in found) if found else None
    told = fmean(float(max(of, key=of.__getitem__) == c) for c, of in itself.items()) if found else None
    everybody = None
    if watched.before and set(like) <= set(watched.before):
        change = flat(watched.after, like) - flat(watched.before, like)
        everybody = fmean(abs(likeness(change, vector)) for vector in truth.values()) if change.any() else None
    sample = heard[0].update if heard else None
    seen = {
        "kind": sample.kind.value if sample else "",
        "types": sorted({str(t.dtype).removeprefix("torch.") for t in sample.tensors.values()}) if sample else [],
        "values": sum(t.numel() for t in sample.tensors.values()) if sample else 0,
        "metrics": sorted(sample.metrics) if sample else [],
        "weights": [min(h.update.weight for h in heard), max(h.update.weight for h in heard)] if heard else [0, 0],
        "sealed": sorted(n.removeprefix(MARK) for n in sample.tensors if n.startswith(MARK)) if sample else [],
    }
    return {
        "configuration": name,
        "seen": seen,
        "hidden": hidden(seen),
        "likeness": own,
        "told_apart": told,
        "everybody": everybody,
        "spent": run.spent(1),
    }


def page(found: Mapping[str, Any]) -> str:
    """The page as Markdown."""
    return "\n".join([HEAD, *table(found["rows"]), "", READING.read_text(), found["about"], ""])


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each configuration."""
    names = ("configuration", "what arrives from a client", "beside it", "like what it computed", "told apart")
    lines = [f"| {' | '.join(names)} | in the next model | spent in a round |", "|---|---|---|---:|---:|---:|---|"]
    for row in rows:
        seen = row["seen"]
        beside = [m for m in seen["metrics"] if m != "examples"]
        if "examples" in seen["metrics"] or "weight" in seen["sealed"] or seen["weights"][0] not in (0, 1):
            beside.append("number of rows")
        what = "nothing" if not seen["values"] else f"{seen['values']:,} of {', '.join(seen['types'])}"
        what += f": {', '.join(seen['sealed'])}" if seen["sealed"] else ""
        spent = "; ".join(f"ε = {of['epsilon']:.3g} for each of the {who}" for who, of in row["spent"].items())
        cells = [f"`{row['configuration']}`", what, ", ".join(beside) or "–"]
        cells += [_figure(row["likeness"]), _figure(row["told_apart"]), _figure(row["everybody"]), spent or "–"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _figure(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.2f}"


HEAD = """# Who sees what

What a run gives away, and to whom. The table is measured by `python -m benchmarks.fidelity.seen`: a round of each
configuration is done, what arrives at the server is noted at the link, and held against what the clients computed in
the same round without protection. The report of each run has the same for that run, in its box *What was protected
against whom*; [fedfm audit](audits.md) measures what can be learnt from it.

## What arrives at the server
"""


def main() -> None:
    """Measure every configuration and write results and page."""
    plain = watch(federation({}), 1)
    like = sorted(plain.exposed()[0].change)
    truth = {one.clients[0]: flat(one.change, like) for one in plain.exposed()}
    rows = []
    for name, changes in CONFIGURATIONS.items():
        rows.append(measure(name, changes, truth, like))
        print(rows[-1], flush=True)
    about = (
        f"{headlines().about}, {CLIENTS} clients with {EACH} rows each; all-minilm-l6-v2, LoRA of rank 4 on the last "
        f"block and a new head, {trees.count({n: plain.before[n] for n in like}):,} values; the first round of FedAvg "
        "with 4 steps, one seed. Noise multipliers are 1, the deviation of local-gaussian 0.01."
    )
    RESULTS.write_text(json.dumps({"rows": rows, "about": about, "machine": machine()}, indent=1) + "\n")
    PAGE.write_text(page(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
