"""Flower's simulation engine: ``flwr[simulation]`` on Ray, a ServerApp with FedAvg and a ClientApp.

    python benchmarks/speed/peers/flower.py JOB OUT.json [--mode reload|keep|reload-one|keep-one]

The client does what FlowerTune's example does: load the model, put the adapter in, an ``SFTTrainer``, take the adapter
out; on text to classify, the plain loop in the trainer's place. ``reload`` loads the model in every task, as the
example does; ``keep`` keeps it in the worker from task to task. There are as many workers as cores, each with one
core, as that has the least idle time; ``-one`` has one worker with all cores, as the example has one for a GPU. Every
client of the job has a virtual node; which of them trains is told to the nodes, so that all peers do the same.

The clock starts when all nodes have answered a first query, so that Ray, the workers and their imports (and the model,
where it is kept) count as start-up; it stops when the strategy has made the last mean.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterable
from typing import Any

from work import BEGAN, Tensors, Work, arguments, average

MODES = ["reload", "keep", "reload-one", "keep-one"]


def run(work: Work, workers: int, cores: int) -> dict[str, Any]:
    """All rounds.

    Args:
        work: the job.
        workers: client processes.
        cores: of the machine, given to Ray.

    Returns:
        ``began`` and ``done`` of the rounds, in seconds since 1970; ``losses``; ``threads`` of a worker.
    """
    from flower_client import app
    from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    found: dict[str, Any] = {"losses": []}

    def mean_loss(contents: list[RecordDict], weighting: str) -> MetricRecord:
        losses = [float(content["metrics"]["loss"]) for content in contents]
        return MetricRecord({"loss": sum(losses) / len(losses)})

    class Told(FedAvg):
        """FedAvg that asks the clients of the job."""

        def configure_train(
            self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
        ) -> Iterable[Message]:
            nodes = list(grid.get_node_ids())
            for node, client in zip(nodes, work.clients(server_round - 1), strict=False):
                own = ConfigRecord({**config, "server-round": server_round, "client": client})
                content = RecordDict({"arrays": arrays, "config": own})
                yield Message(content, message_type=MessageType.TRAIN, dst_node_id=node)

    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Any) -> None:
        config = ConfigRecord({"job": str(work.folder)})
        nodes: list[int] = []
        while len(nodes) < len(work.about["clients"]):
            time.sleep(0.05)
            nodes = list(grid.get_node_ids())
        first = nodes[: max(4 * workers, len(work.clients(0)))]
        content = RecordDict({"config": config})
        there = [Message(content, message_type=MessageType.QUERY, dst_node_id=node) for node in first]
        replies = list(grid.send_and_receive(there, timeout=600))
        if bad := [reply.error for reply in replies if reply.has_error()]:
            raise RuntimeError(f"a worker cannot start: {bad[0]}")
        if len(replies) < len(there):
            raise RuntimeError(f"only {len(replies)} of {len(there)} nodes answered the first query")
        found["threads"] = int(replies[0].content["metrics"]["threads"])
        strategy = Told(fraction_evaluate=0.0, min_available_nodes=1, train_metrics_aggr_fn=mean_loss)
        initial = ArrayRecord(work.initial())
        found["began"] = time.time()
        result = strategy.start(grid, initial, num_rounds=work.rounds, train_config=config)
        found["done"] = time.time()
        found["losses"] = [float(m["loss"]) for _, m in sorted(result.train_metrics_clientapp.items())]
        if len(found["losses"]) != work.rounds:
            raise RuntimeError(f"only {len(found['losses'])} of {work.rounds} rounds gave a model")
        if work.kind == "empty":
            final: Tensors = dict(result.arrays.to_torch_state_dict())
            found["losses"] = [average(final)]

    run_simulation(
        server,
        app,
        num_supernodes=len(work.about["clients"]),
        backend_config={
            "init_args": {"num_cpus": cores, "include_dashboard": False, "log_to_driver": False},
            "client_resources": {"num_cpus": cores // workers, "num_gpus": 0.0},
        },
    )
    return found


def main() -> None:
    """Run and write."""
    warnings.filterwarnings("ignore")
    asked = arguments(MODES)
    work = Work.read(asked.job)
    cores = os.cpu_count() or 1
    workers = 1 if asked.mode.endswith("-one") else cores
    # Ray's workers inherit the environment.
    if asked.mode.startswith("keep"):
        os.environ["PEER_KEEPS_MODEL"] = "1"
    found = run(work, workers, cores)
    if "done" not in found:
        raise SystemExit("the server did not come to its end")
    began = found["began"]
    work.report(
        asked.out,
        "flower",
        asked.mode,
        startup_s=began - BEGAN,
        train_s=found["done"] - began,
        losses=found["losses"],
        threads={"processes": workers, "torch": found["threads"]},
    )


if __name__ == "__main__":
    main()
