"""The report of a run as one HTML file that needs nothing else: no network, no other file, no script to be readable."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from fedfm.report import pictures, tables
from fedfm.report.read import Run, read
from fedfm.report.units import amount, duration, figure, percent, plural, size
from fedfm.report.verdict import verdict
from fedfm.store.files import write_bytes


@dataclass(frozen=True)
class Tile:
    """A key figure."""

    name: str
    value: str
    note: str = ""


def write(folder: Path) -> Path:
    """Write ``report.html`` into a run folder, whether the run has finished or not.

    Args:
        folder: a run folder.

    Returns:
        The path of the page.

    Raises:
        StoreError: the folder holds no run, one of its files cannot be understood, or the page cannot be written.
    """
    folder = Path(folder)
    path = folder / "report.html"
    # JSON can spell lone surrogates, which no encoding can.
    write_bytes(path, render(read(folder)).encode("utf-8", "replace"))
    return path


def render(run: Run) -> str:
    """The page of a run."""
    env = Environment(
        loader=PackageLoader("fedfm", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters["sha256"] = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return env.get_template("page.html").render(
        run=run,
        title=run.results.get("title") or run.recipe.get("title") or run.recipe.get("name") or run.name,
        subtitle=_subtitle(run),
        verdict=verdict(run),
        tiles=tiles(run),
        learning=pictures.learning(run),
        outcome=pictures.outcome(run),
        runs=tables.runs(run),
        cost=pictures.cost(run),
        drops=tables.drops(run),
        data=pictures.data(run),
        clients=tables.clients(run),
        samples=run.results.get("samples", []),
        environment=environment(run),
    )


def tiles(run: Run) -> list[Tile]:
    """The key figures."""
    rounds, out = run.rounds, []
    first = run.records[0] if run.records else {}
    updates = sum(len(r["participants"]) for r in rounds)
    spread = run.data.get("per_client")
    rows = f"{run.data['rows']:,} rows" if "rows" in run.data else ""
    if rows and spread:
        rows += f"; {_rows(spread['min'])} to {_rows(spread['max'])} each, median {_rows(spread['median'])}"
    out.append(Tile("Clients", f"{run.population:,}", rows))
    planned = run.recipe.get("rounds")
    each = f"{updates / len(rounds):.3g} clients a round" if rounds else ""
    out.append(Tile("Rounds", f"{len(rounds):,}" + (f" of {planned:,}" if planned else ""), each))
    for name, key in (("Sent up", "bytes_up"), ("Sent down", "bytes_down")):
        total = sum(r[key] for r in rounds)
        out.append(Tile(name, size(total), f"{size(total / updates)} a client and round" if updates else ""))
    training = sum(r["seconds"] for r in rounds)
    scoring = first.get("seconds", 0) + sum(r["evaluation_seconds"] for r in rounds)
    out.append(Tile("Training time", duration(training), f"and {duration(scoring)} to evaluate"))
    if rounds:
        out.append(Tile("Peak memory", size(1e6 * max(r["peak_memory_mb"] for r in rounds)), "of the process"))
    parameters = run.results.get("parameters", {})
    trainable = parameters.get("trainable", first.get("trainable_parameters"))
    shared = parameters.get("shared", first.get("shared_parameters"))
    if trainable is not None:
        whole = parameters.get("total")
        of = f"{percent(trainable, whole)} of {amount(whole)}; " if whole else ""
        out.append(Tile("Trainable parameters", amount(trainable), f"{of}{amount(shared)} travel"))
    spent = next((r["privacy"] for r in reversed(rounds) if r.get("privacy")), None)
    if spent:
        out.append(Tile("Privacy spent", f"ε = {figure(spent['epsilon'])}", f"at δ = {spent['delta']:.1g}"))
    return out


def environment(run: Run) -> list[tuple[str, str]]:
    """What the run ran on."""
    machine = run.results.get("machine", {})
    rows = [(name, str(version)) for name, version in run.results.get("versions", {}).items()]
    named = {"cpu": "processor", "cores": "cores", "memory_gb": "memory (GB)"}
    return rows + [(named.get(k, k), str(v)) for k, v in machine.items()]


def _rows(count: float) -> str:
    """A median may end in a half."""
    return f"{count:,.0f}" if float(count).is_integer() else f"{count:,.1f}"


def _subtitle(run: Run) -> str:
    named = run.results.get("model") or run.recipe.get("model", {})
    model = named if isinstance(named, str) else named.get("name", "")
    task = run.results.get("task") or (run.recipe.get("task") or {}).get("kind", "")
    return " · ".join(filter(None, [model, run.method, task, plural(run.population, "client")]))
