"""The server: Flower's FedAvg, with a note of each round.

A round is from the moment at which the strategy makes the messages to the moment at which it has the mean.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


class Noted(FedAvg):
    """FedAvg that keeps the seconds of each round, and the clients' own."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.rounds: list[dict[str, Any]] = []

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Begin a round."""
        self.rounds.append({"round": server_round, "began": time.time()})
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """End it."""
        came = list(replies)
        mean = super().aggregate_train(server_round, came)
        seen: list[Any] = [dict(reply.content["metrics"]) for reply in came if reply.has_content()]
        wrong = [reply.error.reason for reply in came if reply.has_error()]
        done = time.time()
        self.rounds[-1] |= {"seconds": done - self.rounds[-1]["began"], "clients": seen, "failed": wrong}
        return mean


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run, and write what each round took."""
    config, sites = context.run_config, int(context.run_config["sites"])
    if config["kind"] == "empty":
        initial = ArrayRecord([np.zeros(256, dtype=np.float32)])
    else:
        sys.path.insert(0, str(config["peers"]))
        from work import Work

        initial = ArrayRecord(Work.read(str(config["job"])).initial())
    strategy = Noted(fraction_evaluate=0.0, min_train_nodes=sites, min_available_nodes=sites)
    strategy.start(grid, initial, num_rounds=int(config["rounds"]))
    write(Path(str(config["out"])), {"rounds": strategy.rounds, "versions": versions()})


def write(place: Path, found: dict[str, Any]) -> None:
    """Write so that whoever looks sees nothing, or all."""
    part = place.with_suffix(".part")
    part.write_text(json.dumps(found))
    part.replace(place)


def versions() -> dict[str, str]:
    """Of the packages that matter."""
    found = {}
    for name in ("flwr", "torch", "transformers", "peft", "trl"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
