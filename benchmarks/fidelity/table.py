"""The page docs/fidelity.md from the result files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedfm.report.units import size

HEAD = """# What the methods do here

<!-- Written by `python -m benchmarks.fidelity.run --table`; do not edit. -->

Each method beside its baseline: same clients, same seeds, same model, in a setting like the one where its paper claims
an advantage, made small enough for a laptop. Figures are mean ± standard deviation over seeds. A claim counts as shown
by a rule that is fixed before the run and stands below: mostly, that the mean of the paired differences is above its
standard error. Three seeds and a few rounds say little about a method at its own scale: "not shown" is no refutation,
and "shown" no proof. How to run it: [benchmarks/fidelity](../benchmarks/fidelity/README.md).
"""


def page(results: Path) -> str:
    """The whole page."""
    found = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    if not found:
        return HEAD + "\nNothing was run yet.\n"
    rows = [
        "| method | baseline | metric | method | baseline | bytes up | bytes down | seconds | memory, MB | shown |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *map(row, found),
    ]
    shown = sum(result["claim_shown"] for result in found)
    count = f"{shown} of {len(found)} claims show. Costs are those of the method over those of the baseline."
    return "\n".join([HEAD, count, "", *rows, "", "## The claims", "", *map(about, found)]).rstrip() + "\n"


def row(result: Mapping[str, Any]) -> str:
    """A line of the table."""
    method, baseline = result["method"], result["baseline"]
    cells = [
        f"[{result['id']}](#{result['id']})",
        name(baseline["arguments"]["method"]),
        f"{result['metric']} ({result['better']} is better)",
        *(value(side) for side in (method, baseline)),
        *(f"{size(method[n])} / {size(baseline[n])}" for n in ("bytes_up", "bytes_down")),
        f"{method['seconds']:.0f} / {baseline['seconds']:.0f}",
        f"{method['memory_mb']:.0f} / {baseline['memory_mb']:.0f}",
        "yes" if result["claim_shown"] else "no",
    ]
    return f"| {' | '.join(cells)} |"


def value(side: Mapping[str, Any]) -> str:
    """Mean and spread."""
    if side["mean"] is None:
        return "diverged"
    return f"{side['mean']:.3f}" + (f" ± {side['spread']:.3f}" if side["spread"] is not None else "")


def name(spec: str | Mapping[str, Any]) -> str:
    """The kind of a part."""
    return spec if isinstance(spec, str) else str(spec["kind"])


def about(result: Mapping[str, Any]) -> str:
    """What was claimed, where it was tried, why it may not show."""
    lines = [f"### {result['id']}", "", f"*{result['claim']}*", "", f"Tried on {result['setting']}."]
    extra = [
        f"`{json.dumps(own)}` for the {who}"
        for who in ("method", "baseline")
        if (own := {k: v for k, v in result[who]["arguments"].items() if k != "method" or not isinstance(v, str)})
    ]
    if extra:
        lines.append(f"With {', '.join(extra)}.")
    lines.append(f"Shown means: {result['rule']}.")
    if not result["claim_shown"]:
        lines.append(f"Not shown; the likely reason: {result['note']}")
    return "\n".join([*lines, ""])
