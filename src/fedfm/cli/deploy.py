"""Commands for federations of organisations: ``deploy init``, ``certs``, ``site``, ``up``, ``run``, ``status``, ..."""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.markup import escape

from fedfm.cli.app import STOPPED, app, output, progress
from fedfm.cli.run import Json, Set, stoppable
from fedfm.errors import FedfmError, RecipeError
from fedfm.recipe import read

deploy = typer.Typer(
    no_args_is_help=True,
    help="A federation of organisations over Flower: TLS, signed messages, a policy at each site.\n\n"
    "To try it: [bold]fedfm deploy up --local --sites 3[/]. To set one up: [bold]init[/], [bold]certs[/], then what "
    "README.md in the folder says.",
)
app.add_typer(deploy, name="deploy", rich_help_panel="Deploy")

Folder = Annotated[Path, typer.Argument(help="The federation's folder, made by [bold]fedfm deploy init[/].")]
POLL_S = 1.0
"""Seconds between two looks at a run."""
ASK_S = 15.0
"""Seconds between two questions to Flower how the run is."""
SILENT_S = 60.0
"""Seconds for which the coordinator may not answer those who watch."""
DONE = ("finished:completed", "finished:failed", "finished:stopped")


@deploy.command()
def init(
    folder: Annotated[Path, typer.Argument(help="The folder to make.")],
    recipe: Annotated[Path, typer.Option(help="The recipe, a YAML file.")],
    sites: Annotated[str, typer.Option(help="Names of the sites, separated by commas.")],
    address: Annotated[str, typer.Option(help="HOST:PORT at which sites reach the coordinator.")] = "127.0.0.1:9092",
    listen: Annotated[str, typer.Option(help="HOST:PORT at which the SuperLink listens, behind a proxy.")] = "",
    host: Annotated[list[str] | None, typer.Option(help="A further name of that machine; repeatable.")] = None,
    set_: Set = None,
) -> None:
    """Make the folder of a federation: a Flower app, the coordinator's folder, one folder for each site, the steps.

    Example: fedfm deploy init trial --recipe recipes/demo.yaml --sites north,south --address fl.example.org:9092
    """
    from fedfm.deploy import bundle

    names = [name.strip() for name in sites.split(",") if name.strip()]
    bundle.init(folder, read(recipe, set_ or ()), names, address, listen, host or ())
    output.print(f"made     {folder}", highlight=False, soft_wrap=True)
    output.print(f"next     fedfm deploy certs {folder}   (all steps are in {folder / 'README.md'})", highlight=False)


@deploy.command()
def certs(
    folder: Annotated[Path, typer.Argument(help="A federation's folder, or that of a site, at the site.")],
) -> None:
    """Make what is missing of a federation's keys: its own authority, the server's certificate, keys of sites.

    At a site, in its own folder, it makes the site's keys alone. Private keys are readable by their owner alone. What
    exists is never replaced.
    """
    from fedfm.deploy import bundle

    bundle.certify(folder)
    output.print(f"keys     {folder}", highlight=False, soft_wrap=True)


@deploy.command()
def site(folder: Annotated[Path, typer.Argument(help="The site's folder, with policy.yaml and keys.")]) -> None:
    """Serve a site: hold its model and rows, and do the tasks that its policy allows. Ends at Ctrl-C."""
    from fedfm.deploy import channel, logs
    from fedfm.deploy.site import Site

    logs.begin(sys.stderr)
    served, ended = Site(folder), False

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal ended
        if ended:
            raise KeyboardInterrupt
        ended = True

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    progress.print(f"site {escape(served.policy.name)} listens at {served.socket}", highlight=False, soft_wrap=True)
    channel.serve(served.socket, served.answer, lambda: ended)


@deploy.command()
def up(
    folder: Annotated[Path, typer.Argument(help="The folder to make, or one made before.")] = Path("federation"),
    local: Annotated[bool, typer.Option("--local", help="All parties on this machine.")] = False,
    sites: Annotated[int, typer.Option(min=1, help="How many of the recipe's clients become sites.")] = 3,
    recipe: Annotated[Path, typer.Option(help="The recipe, a YAML file.")] = Path("recipes/demo.yaml"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last finished round.")] = False,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Run a whole federation on this machine: every party a process of its own, with TLS, keys and policies.

    Example: fedfm deploy up --local --sites 3 --recipe recipes/demo.yaml
    """
    from fedfm.deploy import bundle
    from fedfm.deploy import local as processes
    from fedfm.deploy.coordinator import Settings

    if not local:
        raise RecipeError(
            "deploy up starts all parties on this machine: say so with --local. For organisations apart, use init."
        )
    if is_federation(folder):
        address = Settings.read(folder / "coordinator" / "coordinator.yaml").listen
        names = sorted(path.parent.name for path in (folder / "sites").glob("*/policy.yaml"))
    else:
        address = f"127.0.0.1:{processes.free_port()}"
        names = bundle.rehearsal(folder, read(recipe, set_ or ()), sites, address)
    began, stopped = time.time(), False

    def stop() -> None:
        nonlocal stopped
        stopped = True

    progress.print(f"starting the coordinator at {address} and {len(names)} sites ...", style="dim", highlight=False)
    with stoppable(stop), processes.federation(folder, address, names) as running:

        def tend() -> None:
            if again := running.tend():
                progress.print(f"started again: {', '.join(again)}", style="yellow", highlight=False)
            if "superlink" in again:
                processes.until(lambda: processes.reachable(address), "the SuperLink")
                processes.submit(folder, resume=True)

        processes.submit(folder, resume)
        ended = _watch(folder, lambda: stopped, tend)
        if stopped:
            processes.flwr(folder, "stop", str(processes.current(folder)), "fedfm")
    _finish(folder, ended, json_, began)


@app.command(rich_help_panel="Deploy")
def status(folder: Folder, json_: Json = False) -> None:
    """What the latest run is doing: its rounds, who took part, who was dropped and why."""
    from fedfm.deploy import local as processes

    _see_federation(folder)
    said, records = processes.status(folder), _records(folder)
    if json_:
        print(json.dumps({"status": said, "rounds": records, "waiting": _waiting(folder)}))
        return
    output.print(f"run      {said}", highlight=False)
    for record in records:
        output.print(_line(record), highlight=False)
    if said not in DONE and (waiting := _waiting(folder)).get("for"):
        output.print(escape(f"now      {waiting['for']}, since {waiting['seconds']:.0f} s"), highlight=False)


@app.command(rich_help_panel="Deploy")
def log(folder: Folder, lines: Annotated[int, typer.Option(min=1, help="How many of the last lines.")] = 20) -> None:
    """The audit log: who sent what, how many bytes, its hash, and what became of it."""
    _see_federation(folder)
    place = folder / "coordinator" / "audit.jsonl"
    for line in place.read_text().splitlines()[-lines:] if place.exists() else ():
        print(line)


@app.command(rich_help_panel="Deploy")
def stop(folder: Folder) -> None:
    """Stop the latest run; its last finished round stays, and --resume goes on from there."""
    from fedfm.deploy import local as processes

    _see_federation(folder)
    processes.flwr(folder, "stop", str(processes.current(folder)), "fedfm")
    output.print("stopped", highlight=False)


def start(folder: Path, resume: bool, as_json: bool) -> None:
    """Start a run over the sites that are there, and watch it. Ctrl-C stops watching; the run goes on.

    Args:
        folder: of the federation.
        resume: go on from the last finished round.
        as_json: print the results for programs.
    """
    from fedfm.deploy import local as processes

    began = time.time()
    processes.submit(folder, resume)
    left = False

    def leave() -> None:
        nonlocal left
        left = True

    with stoppable(leave):
        ended = _watch(folder, lambda: left)
    _finish(folder, ended, as_json, began)


def is_federation(folder: Path) -> bool:
    """Whether it is the folder of a federation."""
    return (folder / "coordinator" / "coordinator.yaml").exists()


def _see_federation(folder: Path) -> None:
    if not is_federation(folder):
        raise RecipeError(f"{folder} is not the folder of a federation. Make one: fedfm deploy init, or deploy up.")


def _watch(folder: Path, leave: Callable[[], bool], check: Callable[[], None] = lambda: None) -> str:
    """Print rounds as they are finished, until the run has ended; how it ended."""
    from fedfm.deploy import local as processes

    shown, said = len(_records(folder)), ""
    silent: float | None = None
    began, asked = time.time(), -math.inf
    while said not in DONE and not leave():
        time.sleep(POLL_S)
        check()
        records = _records(folder)
        shown = min(shown, len(records))  # A new run begins its file anew.
        for record in records[shown:]:
            progress.print(_line(record), highlight=False)
        shown = len(records)
        # Flower's command takes seconds of a processor: it is asked often only when the end is near.
        if time.monotonic() - asked < ASK_S and not _near_the_end(folder, began):
            continue
        asked = time.monotonic()
        try:
            said, silent = processes.status(folder), None
        except FedfmError:
            silent = silent or time.monotonic()
            if time.monotonic() - silent > SILENT_S:
                raise
    return said


def _near_the_end(folder: Path, began: float) -> bool:
    """Whether a run that began at ``began`` has written that it ended."""
    place = folder / "coordinator" / "run"
    results, status = place / "results.json", place / "status.json"
    if results.exists() and results.stat().st_mtime > began:
        return True
    new = status.exists() and status.stat().st_mtime > began
    return new and json.loads(status.read_text())["status"] != "completed"  # Then the last scores are still to come.


def _records(folder: Path) -> list[dict[str, Any]]:
    """The finished rounds of the run folder."""
    place = folder / "coordinator" / "run" / "metrics.jsonl"
    return [json.loads(line) for line in place.read_text().split("\n")[:-1]] if place.exists() else []


def _reason(folder: Path, began: float) -> str:
    """Why a run that began at ``began`` failed, as far as it is known; what was before is another run's."""
    log = folder / "coordinator" / "log.jsonl"
    # What stands behind the last end of a line was not written to its end.
    lines = [json.loads(line) for line in log.read_text().split("\n")[:-1]] if log.exists() else []
    failed = [line["reason"] for line in lines if line["message"] == "run failed" and line["time"] >= began]
    return failed[-1] if failed else "its process ended without a word; look at the log of the SuperLink"


def _waiting(folder: Path) -> dict[str, Any]:
    """What the run waits for, and since when."""
    place = folder / "coordinator" / "waiting.json"
    found: dict[str, Any] = {"for": "", "since": time.time()}
    if place.exists():
        found = json.loads(place.read_text())
    return {"for": found["for"], "seconds": round(time.time() - found["since"], 1)}


def _line(record: dict[str, Any]) -> str:
    """A round in a line."""
    loss = f"loss {record['train_loss']:.3f}" if record.get("train_loss") is not None else ""
    there = ", ".join(record.get("participants", {})) or "nobody yet"
    dropped = "".join(f"; dropped {d['client']}: {d['reason']}" for d in record.get("dropped", []))
    return escape(f"round {record['round']:>3}  {record['seconds']:6.1f} s  {loss:<11}  {there}{dropped}")


def _finish(folder: Path, ended: str, as_json: bool, began: float) -> None:
    """Print the results of a run that has ended, and exit with a code that tells the truth."""
    from fedfm.cli.run import show

    place = folder / "coordinator" / "run"
    if ended == "finished:completed":
        results = json.loads((place / "results.json").read_text())
        print(json.dumps(results)) if as_json else show(results, place)
        return
    if ended == "finished:failed":
        reason = _reason(folder, began)
        raise FedfmError(f"the run failed: {reason}. Mend that, then go on: fedfm run {folder} --resume")
    progress.print(f"the run is {ended or 'under way'}; look again: fedfm status {folder}", highlight=False)
    raise typer.Exit(STOPPED)
