"""NVFlare: its simulator with the Client API and FedAvg.

    python benchmarks/speed/peers/nvflare_peer.py JOB OUT.json [--mode all|cores]

``all`` has as many simulator threads as clients: every client has a process that stays and keeps the model, each with
one torch thread, as that is the fastest here. ``cores`` has one simulator thread per core, so that clients take turns
and each begins anew for each task, which takes far longer and less memory. The client's steps are those of the plain
loop, as in NVFlare's own PyTorch examples.

The clock starts when all clients, with the model in memory, have answered a first task, and stops when the last mean
is made.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

from work import BEGAN, Work, arguments

PEERS = Path(__file__).resolve().parent


def main() -> None:
    """Run and write."""
    asked = arguments(["all", "cores"])
    work = Work.read(asked.job)
    count = len(work.about["clients"])
    if any(len(work.clients(number)) != count for number in range(work.rounds)):
        raise SystemExit("this script has all clients take part in all rounds")
    threads = count if asked.mode == "all" else min(count, os.cpu_count() or 1)
    # Of the processes that NVFlare starts.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(PEERS), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ["PEER_CLIENT_THREADS"] = "1"

    from nvflare.job_config.api import FedJob
    from nvflare.job_config.script_runner import FrameworkType, ScriptRunner
    from nvflare_server import Timed

    with tempfile.TemporaryDirectory() as scratch:
        notes = Path(scratch) / "notes.json"
        job = FedJob(name="speed", min_clients=count)
        job.to(Timed(str(work.folder), str(notes), count, work.rounds), "server")
        client = ScriptRunner(
            script=str(PEERS / "nvflare_client.py"), script_args=str(work.folder), framework=FrameworkType.NUMPY
        )
        job.to_clients(client)
        status = job.simulator_run(scratch, n_clients=count, threads=threads)
        if status or not notes.exists():
            print(f"the simulator ended with {status}", file=sys.stderr)
            logs = "\n".join(p.read_text(errors="replace") for p in sorted(Path(scratch).rglob("log.txt")))
            print("\n".join([x for x in logs.splitlines() if "Error" in x or "ERROR" in x][:12]), file=sys.stderr)
            raise SystemExit(1)
        found = json.loads(notes.read_text())
    losses = [found["mean"]] if work.kind == "empty" else found["losses"]
    work.report(
        asked.out,
        "nvflare",
        asked.mode,
        startup_s=found["began"] - BEGAN,
        train_s=found["done"] - found["began"],
        losses=losses,
        threads={"processes": threads, "torch": 1},
    )


if __name__ == "__main__":
    main()
