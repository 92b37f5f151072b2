"""fedfm beside its peers on the same job: seconds, start-up and memory, alternating in one run.

    python -m benchmarks.speed.compare a                       # all peers of job a, three passes
    python -m benchmarks.speed.compare a --peers plain,fedfm:sequential,fedfm:fused,trl --repeats 5
    python -m benchmarks.speed.compare b --clients 8,64,256,1024
    python -m benchmarks.speed.compare c --clients 10,100,500 --megabytes 0,10

A peer is a script in ``peers`` and, after a colon, its mode; without one, the script's first. Each run is a process of
its own; in every pass each peer has one turn, and the order is turned on by one from pass to pass, so that what the
machine does meanwhile falls on all. What counts is the median over the passes, and of ratios the median of the ratios
within a pass. A ratio of 0.5 means half the seconds of the plain loop.

Peers other than fedfm and the plain loop run in a virtual environment of their own, made from ``peers/NAME.txt`` when
it is not there. Memory is the largest sum over all processes of a run, each page that several share counted once.

All peers must come to the same losses as the plain loop; one that does not, or fails, is reported, and the exit code
is 1. ``results/compare-JOB.json`` holds every single run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.speed.memory import Watch
from benchmarks.speed.prepare import HOME
from fedfm.results import machine
from fedfm.store.files import write_json

HERE = Path(__file__).parent
PEERS = HERE / "peers"
REFERENCE = "plain"

SCRIPTS = {
    "plain": "plain.py",
    "fedfm": "fedfm_peer.py",
    "trl": "trl_peer.py",
    "flower": "flower.py",
    "pfl": "pfl_peer.py",
    "nvflare": "nvflare_peer.py",
}
"""The script of each peer; one that would hide the package that it imports has another name than that package."""

HERE_ALREADY = ("plain", "fedfm")
"""Peers whose packages the present environment has."""

USUAL = {
    "a": ("plain", "fedfm:sequential", "fedfm:fused", "trl", "pfl", "flower", "flower:reload-one", "nvflare"),
    "b": ("plain", "fedfm:sequential", "fedfm:fused", "pfl", "flower"),
    "c": ("plain", "fedfm", "pfl", "flower", "nvflare"),
}
"""Peers of each job unless told."""

HALF = ("plain:bf16", "fedfm:sequential-bf16", "fedfm:fused-bf16")
"""Peers of job a that are added where the processor has instructions for bfloat16; others imitate it, far slower."""

CLIENTS = {"a": (8,), "b": (8, 64, 256, 1024), "c": (10, 100, 500)}

MOST_CLIENTS = {"nvflare": 32}
"""Clients beyond which a peer is left out: NVFlare's simulator has a process for each, or begins a new one for each
task, which takes seconds."""

TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}
"""How far losses may lie from those of the plain loop in float32, relative to them."""

QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "DO_NOT_TRACK": "1",
    "WANDB_DISABLED": "true",
}
"""Environment of every run: no network, no telemetry."""

Run = Mapping[str, Any]


@dataclass(frozen=True)
class Failure:
    """A run that gave no result.

    Args:
        peer: whose.
        reason: the end of what it said.
    """

    peer: str
    reason: str


def environment(name: str, folder: Path) -> Path:
    """The Python of a peer's virtual environment; made anew when the peer's file has changed.

    Raises:
        subprocess.CalledProcessError: pip could not install it.
    """
    if name in HERE_ALREADY:
        return Path(sys.executable)
    place, wanted = folder / name, (PEERS / f"{name}.txt").read_text()
    stamp, python = place / "installed.txt", place / "bin" / "python"
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"installing {name} in {place}", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(place)], check=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--requirement", str(PEERS / f"{name}.txt")]
    subprocess.run(install, check=True, stdout=sys.stderr)
    stamp.write_text(wanted)
    return python


def measured(peer: str, python: Path, job: Path, threads: int, timeout_s: float) -> dict[str, Any] | Failure:
    """One run of a peer in a process of its own."""
    name, _, mode = peer.partition(":")
    mark = f"PEER_RUN={uuid.uuid4().hex}"
    with tempfile.TemporaryDirectory(prefix="fedfm-speed-") as scratch:
        out, said = Path(scratch) / "out.json", Path(scratch) / "said.txt"
        command = [str(python), str(PEERS / SCRIPTS[name]), str(job), str(out), *(["--mode", mode] if mode else [])]
        variables = {**os.environ, **QUIET, **dict([mark.split("=")]), "PEER_BEGAN": repr(time.time())}
        if threads:
            variables["OMP_NUM_THREADS"] = str(threads)
        load = os.getloadavg()[0]
        watch = Watch(mark)
        with said.open("wb") as log:
            process = subprocess.Popen(command, cwd=scratch, env=variables, stdout=log, stderr=subprocess.STDOUT)
            watch.start()
            try:
                code: int | None = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                watch.stop()
        if code != 0 or not out.exists():
            what = f"took more than {timeout_s:g} s" if code is None else f"ended with code {code}"
            tail = said.read_text(errors="replace").splitlines()[-25:]
            return Failure(peer, "\n".join([what, *tail]))
        run = json.loads(out.read_text())
    if not all(map(math.isfinite, run["losses"])):
        return Failure(peer, f"losses {run['losses']} are not finite")
    # The load before a run shows whether the machine had other work.
    return {**run, "peak_mb": watch.peak_mb, "most_processes": watch.processes, "load_before": load}


def summary(passes: Sequence[Mapping[str, Run]]) -> dict[str, dict[str, float]]:
    """Each peer's medians over the passes.

    Args:
        passes: for each pass the run of every peer that gave a result.

    Returns:
        By peer: ``seconds_a_step`` with ``least`` and ``most``, ``startup_s``, ``peak_mb``, ``passes``, and, where the
        plain loop ran, ``ratio`` and ``memory_ratio`` to it in the same pass and the largest ``deviation`` of losses.
    """
    found: dict[str, dict[str, float]] = {}
    for peer in dict.fromkeys(name for one in passes for name in one):
        runs = [one[peer] for one in passes if peer in one]
        pairs = [(one[peer], one[REFERENCE]) for one in passes if peer in one and REFERENCE in one]
        steps = [run["train_s"] / run["steps"] for run in runs]
        row = {
            "seconds_a_step": statistics.median(steps),
            "least": min(steps),
            "most": max(steps),
            "startup_s": statistics.median(run["startup_s"] for run in runs),
            "peak_mb": statistics.median(run["peak_mb"] for run in runs),
            "passes": len(runs),
        }
        if pairs:
            row["ratio"] = statistics.median(a["train_s"] / b["train_s"] for a, b in pairs)
            row["memory_ratio"] = statistics.median(a["peak_mb"] / b["peak_mb"] for a, b in pairs)
            if math.isfinite(far := max(deviation(a, b) for a, b in pairs)):
                row["deviation"] = far
        found[peer] = row
    return found


def deviation(run: Run, reference: Run) -> float:
    """The largest relative difference of the losses of two runs; infinite when they have not as many rounds, or where
    a loss is no number."""
    if len(run["losses"]) != len(reference["losses"]):
        return math.inf
    far = [abs(a - b) / abs(b) for a, b in zip(run["losses"], reference["losses"], strict=True)]
    return max(far, default=0.0) if all(map(math.isfinite, far)) else math.inf


def strangers(passes: Sequence[Mapping[str, Run]]) -> list[Failure]:
    """Runs that did not come to the losses of the plain loop, so that their seconds say nothing."""
    found = []
    for one in passes:
        for peer, run in one.items():
            allowed = TOLERANCE["bf16" if "bf16" in run["mode"] else "fp32"]
            if REFERENCE in one and (far := deviation(run, one[REFERENCE])) > allowed:
                reason = (
                    f"losses {run['losses']} are not those of the plain loop, {one[REFERENCE]['losses']}: {far:.2g}"
                )
                found.append(Failure(peer, reason))
    return found


def table(about: Mapping[str, Any], rows: Mapping[str, Mapping[str, float]]) -> Table:
    """The summary for the terminal."""
    empty = about["kind"] == "empty"
    shown = Table(title=f"job {about['job']}, {about['clients']} clients: {about['about']}", title_justify="left")
    shown.add_column("peer")
    unit, factor = ("ms a task", 1e3) if empty else ("s a step", 1.0)
    for name in (unit, "least", "most", "start-up s", "peak MB", "time / plain", "memory / plain", "passes"):
        shown.add_column(name, justify="right")
    for peer, row in sorted(rows.items(), key=lambda item: item[1]["seconds_a_step"]):
        times = [f"{factor * row[name]:.3f}" for name in ("seconds_a_step", "least", "most")]
        ratios = [f"{row[name]:.2f}" if name in row else "" for name in ("ratio", "memory_ratio")]
        shown.add_row(peer, *times, f"{row['startup_s']:.1f}", f"{row['peak_mb']:.0f}", *ratios, f"{row['passes']:.0f}")
    return shown


def prepared(job: str, folder: Path, clients: int, rounds: int, megabytes: float) -> dict[str, Any]:
    """Write the job in a process of its own, so that this one stays small; what is to be known of it."""
    command = [sys.executable, "-m", "benchmarks.speed.prepare", job, "--out", str(folder)]
    command += ["--clients", str(clients), "--rounds", str(rounds), "--megabytes", str(megabytes)]
    subprocess.run(
        command, check=True, cwd=HERE.parents[1], env={**os.environ, **QUIET}, stdout=subprocess.DEVNULL, stderr=None
    )
    about: dict[str, Any] = json.loads((folder / "about.json").read_text())
    return about


def has_bf16() -> bool:
    """Whether the processor has instructions for bfloat16."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def compare(
    about: Mapping[str, Any], folder: Path, peers: Mapping[str, Path], repeats: int, threads: int, timeout_s: float
) -> tuple[dict[str, Any], list[Failure]]:
    """All passes of one job.

    Returns:
        What the result file holds of it, and what failed.
    """
    passes: list[dict[str, Any]] = []
    failures: list[Failure] = []
    names = list(peers)
    for number in range(repeats):
        passes.append({})
        turned = names[number % len(names) :] + names[: number % len(names)]
        for peer in turned:
            run = measured(peer, peers[peer], folder, threads, timeout_s)
            if isinstance(run, Failure):
                failures.append(run)
                print(f"pass {number + 1}: {peer} failed", file=sys.stderr, flush=True)
                continue
            passes[-1][peer] = run
            print(
                f"pass {number + 1}: {peer} {run['train_s']:.2f} s, start-up {run['startup_s']:.1f} s, "
                f"{run['peak_mb']:.0f} MB",
                file=sys.stderr,
                flush=True,
            )
    failures += strangers(passes)
    found = {
        "job": dict(about),
        "summary": summary(passes),
        "passes": passes,
        "failures": [{"peer": f.peer, "reason": f.reason} for f in failures],
    }
    return found, failures


def main(words: Sequence[str] | None = None) -> int:
    """The command. Returns 1 when a peer failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.compare")
    parser.add_argument("job", choices=tuple(USUAL))
    parser.add_argument("--peers", help="such as plain,fedfm:fused,trl; by default all of the job")
    parser.add_argument("--repeats", type=int, default=3, help="passes")
    parser.add_argument("--clients", help="numbers of clients, such as 8,64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", default="0,10", help="sizes of the update of job c")
    parser.add_argument("--threads", type=int, default=0, help="OMP_NUM_THREADS of the peers; by default unset")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds that one run may take")
    parser.add_argument("--env-dir", type=Path, default=HOME / "envs", help="where the peers' environments are")
    parser.add_argument("--out", type=Path, help="result file; by default results/compare-JOB.json")
    asked = parser.parse_args(words)
    usual = USUAL[asked.job] + (HALF if asked.job == "a" and has_bf16() else ())
    peers = asked.peers.split(",") if asked.peers else list(usual)
    if unknown := [peer for peer in peers if peer.partition(":")[0] not in SCRIPTS]:
        parser.error(f"there is no peer {', '.join(unknown)}, only {', '.join(SCRIPTS)}.")
    clients = [int(n) for n in asked.clients.split(",")] if asked.clients else CLIENTS[asked.job]
    sizes = [float(n) for n in asked.megabytes.split(",")] if asked.job == "c" else [0.0]

    failures: list[Failure] = []
    pythons: dict[str, Path] = {}
    for peer in peers:
        try:
            pythons[peer] = environment(peer.partition(":")[0], asked.env_dir)
        except (subprocess.CalledProcessError, OSError) as error:
            failures.append(Failure(peer, f"cannot be installed: {error}"))
    done, console = [], Console(width=140)
    for count in clients:
        for size in sizes:
            able = {peer: p for peer, p in pythons.items() if count <= MOST_CLIENTS.get(peer.partition(":")[0], count)}
            left_out = sorted(pythons.keys() - able.keys())
            with tempfile.TemporaryDirectory(prefix="fedfm-job-") as scratch:
                folder = Path(scratch)
                about = prepared(asked.job, folder, count, asked.rounds, size)
                found, failed = compare(about, folder, able, asked.repeats, asked.threads, asked.timeout)
            done.append({**found, "left_out": left_out})
            failures += failed
            console.print(table(about, found["summary"]))
            if left_out:
                console.print(f"left out with {count} clients: {', '.join(left_out)}")
    about_all = {"machine": machine(), "python": platform.python_version(), "bf16_in_hardware": has_bf16()}
    scripts = hashlib.sha256(b"".join(p.read_bytes() for p in sorted(PEERS.glob("*.py")))).hexdigest()
    out = asked.out or HERE / "results" / f"compare-{asked.job}.json"
    write_json(out, {**about_all, "scripts_sha256": scripts, "repeats": asked.repeats, "jobs": done})
    print(about_all)
    for failure in failures:
        print(f"\n{failure.peer} failed: {failure.reason}", file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    # Ended from outside, it must still end what it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
