"""The page docs/speed.md with its charts, from the result files.

    python -m benchmarks.speed.page          # writes docs/speed.md and docs/speed-*.svg

What has no result file is named on the page as not yet measured.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.speed import sections
from benchmarks.speed.wanted import goals

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[2] / "docs"

HEAD = """# How fast fedfm is

<!-- Written by `python -m benchmarks.speed.page`; do not edit. -->

Ratios, not records. What is compared runs in one command on one machine: each run in a process of its own, the
competitors taking turns, at least three times each, and the median counts. Peers do the same steps on the same batches
from the same first values and must come to the same losses; each is a short script in
[benchmarks/speed/peers](../benchmarks/speed/peers). Seconds are those of training; start-up stands beside them. Memory
counts all processes of a run, and what they share once. Goals that are not met stay in the table.
"""

PARTS: dict[str, tuple[str, str, Callable[[Mapping[str, Any], sections.Pictures], Iterator[str]]]] = {
    "compare-a": ("A real model", "python -m benchmarks.speed.compare a", sections.real_model),
    "compare-b": ("More clients", "python -m benchmarks.speed.compare b", sections.more_clients),
    "compare-c": ("Empty work", "python -m benchmarks.speed.compare c", sections.empty_work),
    "scale": ("A million clients", "python -m benchmarks.speed.scale", sections.crowd),
    "gpu": ("On a CUDA card", "python -m benchmarks.speed.gpu", sections.card),
    "fused": ("Fused beside one by one", "python -m benchmarks.speed.fused", sections.fused),
    "overhead": ("The engine beside a plain loop", "python -m benchmarks.speed.overhead", sections.overhead),
    "fedkseed_memory": ("Memory of inference", "python -m benchmarks.speed.fedkseed_memory", sections.seeds),
    "secure": ("Sums of unseen uploads", "python -m benchmarks.speed.secure", sections.unseen),
    "robust": ("Robust rules", "python -m benchmarks.speed.robust", sections.rules),
    "profile": ("Where the remaining time goes", "python -m benchmarks.speed.profiled", sections.remaining),
}
"""Result files in the order of the page: heading, what writes the file, and what is said of it."""


def read(folder: Path) -> dict[str, Any]:
    """The result files that are there, by name."""
    found = {name: folder / f"{name}.json" for name in PARTS}
    return {name: json.loads(path.read_text()) for name, path in found.items() if path.exists()}


def where(result: Mapping[str, Any]) -> str:
    """Machine and versions, as a line."""
    machine = result.get("machine") or {}
    versions = dict(result.get("versions") or {}) | {n: result[n] for n in ("python", "torch") if n in result}
    for one in result.get("jobs", ()):
        for run in (run for turn in one["passes"] for run in turn.values()):
            versions |= run.get("versions") or {}
    about = [machine.get("card"), machine.get("cpu")]
    about += [f"{machine['cores']} cores, {machine['memory_gb']:g} GB"] if machine else []
    about += [f"{name} {text}" for name, text in sorted(versions.items()) if text]
    return f"*Measured on: {', '.join(filter(None, about))}.*" if any(about) else ""


def page(results: Path) -> tuple[str, dict[str, str]]:
    """The whole page, and its charts as SVG by name."""
    found, pictures = read(results), {}
    text = [HEAD, "## Goals", "", *sections.goal_rows(goals(found, sections.peer))]
    for name, (heading, command, part) in PARTS.items():
        text += [f"## {heading}", ""]
        if name in found:
            text += [*part(found[name], pictures), where(found[name]), ""]
        else:
            text += [f"Not yet measured (`{command}`)." if " -m " in command else f"Not yet measured: {command}.", ""]
    commands = [command for _, command, _ in PARTS.values() if " -m " in command]
    text += ["## Measure it yourself", "", "`make bench-speed` runs everything. One by one:", "", "```"]
    text += [*commands, "python -m benchmarks.speed.page", "```", ""]
    text += ["Peers other than the plain loop are installed into environments of their own when they are first needed."]
    return "\n".join(line for line in text).replace("\n\n\n", "\n\n") + "\n", pictures


def main(results: Path = RESULTS, docs: Path = DOCS) -> None:
    """Write the page and its charts; charts that it no longer shows go."""
    text, pictures = page(results)
    for old in docs.glob("speed-*.svg"):
        old.unlink()
    for name, drawn in pictures.items():
        (docs / f"{name}.svg").write_text(drawn)
    (docs / "speed.md").write_text(text)


if __name__ == "__main__":
    sys.exit(main())
