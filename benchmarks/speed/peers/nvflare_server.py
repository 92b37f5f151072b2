"""What the server does in :mod:`nvflare_peer`: NVFlare's FedAvg, with notes of time and loss."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.workflows.fedavg import FedAvg
from work import Work


class Timed(FedAvg):
    """FedAvg that begins when all clients are there and keeps nothing on disk.

    Args:
        folder: the job.
        notes: JSON file to write: ``began`` and ``done`` in seconds since 1970, ``losses``, and ``mean``, that of all
            numbers of the final model.
        num_clients: clients, which all take part.
        num_rounds: rounds.
    """

    def __init__(self, folder: str, notes: str, num_clients: int, num_rounds: int) -> None:
        super().__init__(num_clients=num_clients, num_rounds=num_rounds, persistor_id="", save_filename="")
        # NVFlare writes these to the job's configuration and reads them back in the server's process.
        self.folder = folder
        self.notes = notes
        self._found: dict[int, list[float]] = {}
        self._final: FLModel | None = None

    def run(self) -> None:
        """All rounds."""
        first = FLModel(params={"there": np.zeros(1, dtype=np.float32)}, current_round=0)
        self.send_model_and_wait(targets=self.sample_clients(self.num_clients), data=first)
        began = time.time()
        super().run()
        done = time.time()
        losses = [sum(found) / len(found) for _, found in sorted(self._found.items())]
        final = self._final.params if self._final else {}
        mean = float(np.mean([np.mean(array) for array in final.values()]))
        Path(self.notes).write_text(json.dumps({"began": began, "done": done, "losses": losses, "mean": mean}))

    def load_model(self) -> FLModel:
        """The first values of the job."""
        return FLModel(params={name: t.numpy() for name, t in Work.read(self.folder).initial().items()})

    def save_model(self, model: FLModel) -> None:
        """Keep it in memory."""
        self._final = model

    def _aggregate_one_result(self, result: FLModel) -> bool:
        self._found.setdefault(self.current_round, []).append(float(result.metrics["loss"]))
        return bool(super()._aggregate_one_result(result))
