"""fedfm's commands as a user types them, in processes of their own, and what they leave behind.

At home is ``fedfm run``; deployed is ``fedfm deploy up --local``: SuperLink, SuperNodes, site processes and apps as
real processes, with TLS, keys and policies. Nothing else of fedfm's inside is used, and what is read is the run folder.

Both compute with as many threads as the other: a sum over threads depends on their number.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.speed.compare import QUIET
from benchmarks.speed.memory import Watch

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
SITES = 3
THREADS = 1
"""Of each process that computes, at home as at a site."""
PACKAGES = ("fedfm", "flwr", "torch", "transformers", "peft", "safetensors", "numpy")

Record = dict[str, Any]
"""A round, as ``metrics.jsonl`` has it."""


@dataclass(frozen=True)
class Done:
    """A command that has ended.

    Args:
        code: its exit code; ``None`` when it took too long.
        wall_s: seconds that it took.
        peak_mb: largest memory of all its processes together.
        said: the end of what it wrote to standard error.
        place: the run folder.
    """

    code: int | None
    wall_s: float
    peak_mb: float
    said: str
    place: Path

    @property
    def good(self) -> bool:
        """Whether the run was completed."""
        return self.code == 0 and (self.place / "results.json").exists()

    def records(self) -> list[Record]:
        """Its finished rounds; round 0 is the model before training."""
        file = self.place / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def results(self) -> dict[str, Any]:
        """What it found at its end."""
        found: dict[str, Any] = json.loads((self.place / "results.json").read_text())
        return found


def home(recipe: Path, place: Path, changes: Sequence[str] = (), timeout_s: float = 600, clients: int = SITES) -> Done:
    """A run in one process.

    Args:
        recipe: the file.
        place: the run folder to make.
        changes: keys with values, as ``--set`` takes them.
        timeout_s: seconds that it may take.
        clients: how many take part; as many sites would be the same ones. 0 means all.
    """
    few = [f"data.max_clients={clients}"] if clients else []
    words = ["run", str(recipe), *sets([*changes, *few, f"output_dir={place}"])]
    return ran([sys.executable, "-m", "fedfm", *words], place, place.parent, timeout_s)


def deployed(recipe: Path, folder: Path, changes: Sequence[str] = (), timeout_s: float = 600) -> Done:
    """A run over processes of organisations.

    Args:
        recipe: the file.
        folder: of the federation, to make.
        changes: keys with values, as ``--set`` takes them.
        timeout_s: seconds that it may take, with start and end of all processes.
    """
    words = ["deploy", "up", str(folder), "--local", "--sites", str(SITES), "--recipe", str(recipe), *sets(changes)]
    place = folder / "coordinator" / "run"
    done = ran([sys.executable, "-m", "fedfm", *words], place, folder.parent, timeout_s)
    return done if done.good else Done(done.code, done.wall_s, done.peak_mb, told(done.said, folder), place)


def sets(changes: Sequence[str]) -> list[str]:
    """Each change with its ``--set`` before it."""
    return [word for change in changes for word in ("--set", change)]


def ran(command: Sequence[str], place: Path, cwd: Path, timeout_s: float) -> Done:
    """Run a command to its end; nothing that it started outlives it.

    Args:
        command: with its arguments.
        place: the run folder that it makes.
        cwd: where it runs, and where what it says is kept.
        timeout_s: seconds that it may take.
    """
    mark = f"BENCHMARK_RUN={uuid.uuid4().hex}"
    out, err = cwd / f"{place.name}.out", cwd / f"{place.name}.err"
    watch, began = Watch(mark), time.monotonic()
    code: int | None = None
    with out.open("wb") as said, err.open("wb") as complained:
        process = subprocess.Popen(
            list(command), cwd=cwd, env=variables(mark), stdout=said, stderr=complained, start_new_session=True
        )
        watch.start()
        try:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(timeout_s)
        finally:
            wall_s = time.monotonic() - began
            watch.stop()  # ends what is left of them
            process.wait()
    what = f"took more than {timeout_s:g} s" if code is None else f"ended with code {code}" if code else ""
    return Done(
        code, round(wall_s, 2), round(watch.peak_mb), "\n".join(part for part in (what, tail(err, 12)) if part), place
    )


def variables(mark: str) -> dict[str, str]:
    """The environment of a command.

    Args:
        mark: ``NAME=value``, by which all that it starts is known.
    """
    path = os.environ.get("PYTHONPATH", "")
    # Relative paths would lead elsewhere from another folder.
    absolute = os.pathsep.join(str(Path(part).resolve()) for part in path.split(os.pathsep) if part)
    own = {"OMP_NUM_THREADS": str(THREADS), "FLWR_DISABLE_UPDATE_CHECK": "1", "PYTHONPATH": absolute}
    # Modules are compiled once, as those of an installed package are, and not by every process.
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**inherited, **QUIET, **own, **dict([mark.split("=")])}


def tail(file: Path, lines: int) -> str:
    """The last lines of a file."""
    return "\n".join(file.read_text(errors="replace").strip().splitlines()[-lines:]) if file.exists() else ""


def told(said: str, folder: Path) -> str:
    """Why a federation did not come to its end: what the command said, whom it refused and why, the ends of logs."""
    audit, parts = folder / "coordinator" / "audit.jsonl", [said]
    lines = audit.read_text().splitlines() if audit.exists() else []
    refused = [line for line in map(json.loads, lines) if line["verdict"] == "refused"]
    parts += list(dict.fromkeys(f"refused: {line.get('reason', '')}" for line in refused))[:3]
    if not refused:
        parts += [f"{log.name}: {end}" for log in sorted((folder / "logs").glob("*.log")) if (end := tail(log, 6))]
    return "\n".join(part for part in parts if part)


def about() -> dict[str, Any]:
    """Machine and versions, for a result file."""
    from fedfm.results import machine

    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return {"machine": machine(), "versions": found, "sites": SITES, "threads": THREADS}


def rounds(records: Sequence[Record]) -> list[Record]:
    """The rounds of training."""
    return [record for record in records if record["round"] > 0]


def total(records: Sequence[Mapping[str, Any]], key: str) -> float:
    """The sum of a number over the rounds of training."""
    return sum(record[key] for record in records if record["round"] > 0)


def ends_with_what_it_started() -> None:
    """Have this process, when it is ended from outside, still end what it started."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
