"""Real processes on the loopback interface: SuperLink, SuperNodes, site processes, apps; killed and started again."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("flwr")
from fedfm.deploy import bundle, local
from fedfm.recipe import Recipe

pytestmark = pytest.mark.slow
Make = Callable[..., Recipe]


def waited(folder: Path, least: int = 10**6, seconds: float = 240) -> str:
    """How the run ended; returns earlier when it has finished the round ``least``."""
    until, said = time.monotonic() + seconds, ""
    while not said.startswith("finished") and time.monotonic() < until:
        time.sleep(1)
        if len(records(folder)) > least:
            return "under way"
        said = local.status(folder)
    return said


def records(folder: Path) -> list[dict[str, Any]]:
    place = folder / "coordinator" / "run" / "metrics.jsonl"
    return [json.loads(line) for line in place.read_text().splitlines()] if place.exists() else []


def weights(place: Path) -> dict[str, torch.Tensor]:
    return load_file(place / "final" / "adapter_model.safetensors")


def at_home(recipe: Recipe, count: int, place: Path) -> dict[str, torch.Tensor]:
    """The same clients in one process, which computes with as many threads as those of the sites."""
    file = place.with_suffix(".yaml")
    file.write_text(recipe.to_yaml())
    changes = ("--set", f"data.max_clients={count}", "--set", f"output_dir={place}")
    subprocess.run([sys.executable, "-m", "fedfm", "run", str(file), *changes], check=True, timeout=120)
    return weights(place)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_three_sites_over_tls_with_losses(recipe: Make, tmp_path: Path) -> None:
    """Bit for bit the run in one process, although SuperLink, ServerApp and a site process are killed on the way."""
    settings: dict[str, Any] = {"method": "feddyn", "rounds": 3, "evaluation": {"every": 0}}
    folder, address = tmp_path / "federation", f"127.0.0.1:{local.free_port()}"
    names = bundle.rehearsal(folder, recipe(**settings), 3, address)
    sites = folder / "sites"
    with local.federation(folder, address, names) as running:
        local.submit(folder, resume=False)
        assert waited(folder, least=1) == "under way"
        # The machine of the coordinator dies, and comes back.
        running.kill("superlink")
        home = local.environment(folder / "coordinator" / "flower")
        running.start(
            "superlink", local.superlink(folder / "coordinator", address), home, lambda: local.reachable(address)
        )
        # So does a site process; what it keeps is on its disk.
        running.kill(f"site-{names[0]}")
        local.start_site(running, sites / names[0])
        local.submit(folder, resume=True)
        assert waited(folder) == "finished:completed", running.said("superlink", 40)
    assert [record["round"] for record in records(folder)] == [0, 1, 2, 3]
    assert all(sorted(record["participants"]) == names for record in records(folder)[1:])
    assert same(weights(folder / "coordinator" / "run"), at_home(recipe(**settings), 3, tmp_path / "home"))
    audit = [json.loads(line) for line in (folder / "coordinator" / "audit.jsonl").read_text().splitlines()]
    assert {line["verdict"] for line in audit} >= {"joined", "received", "admitted"}
    said = "".join(path.read_text(errors="replace") for path in (folder / "logs").iterdir())
    for key in folder.rglob("*.key"):
        secret = "".join(key.read_text().splitlines()[1:-1])
        assert secret[:40] not in said


def test_nobody_else_gets_in(recipe: Make, tmp_path: Path) -> None:
    """A SuperNode with a key that is not registered, one with another authority, one without TLS."""
    folder, address = tmp_path / "federation", f"127.0.0.1:{local.free_port()}"
    [name] = bundle.rehearsal(folder, recipe(rounds=1), 1, address)
    other = tmp_path / "other"
    bundle.rehearsal(other, recipe(rounds=1), 1, address)
    ended: dict[str, int | None] = {}

    def attempt(kind: str, site: Path, *more: str) -> None:
        command = [*local.supernode(site, address, local.free_port()), "--max-retries", "1", *more]
        if kind == "no TLS":
            command[command.index("--root-certificates") : command.index("--root-certificates") + 2] = ["--insecure"]
        running.start(kind, command, local.environment(tmp_path / kind))
        try:
            ended[kind] = running.running[kind].wait(20)
        except subprocess.TimeoutExpired:
            ended[kind] = None  # It goes on trying.
        finally:
            running.kill(kind)

    with local.federation(folder, address, [name]) as running:
        stranger = tmp_path / "stranger"
        stranger.mkdir()
        (stranger / "ca.pem").write_bytes((folder / "sites" / name / "ca.pem").read_bytes())
        (stranger / "node.key").write_bytes((other / "sites" / name / "node.key").read_bytes())
        tries = [("unknown key", stranger), ("other authority", other / "sites" / name), ("no TLS", stranger)]
        threads = [threading.Thread(target=attempt, args=one) for one in tries]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        local.submit(folder, resume=False)
        assert waited(folder) == "finished:completed"
    assert list(records(folder)[1]["participants"]) == [name]
    assert set(ended) == {"unknown key", "other authority", "no TLS"}
    said = {kind: (folder / "logs" / f"{kind}.log").read_text() for kind in ended}
    assert not any("SuperNode ID" in text for text in said.values())
