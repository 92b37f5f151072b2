"""TensorBoard event files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedfm.observe.observer import Observer


class TensorBoard(Observer):
    """Writes each round's losses, metrics, traffic and time.

    Args:
        folder: where the event files go.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def started(self, name: str, rounds: int, done: int, steps: float) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Points of rounds after the checkpoint are of a run that was cut off, and are drawn anew.
        self._writer = SummaryWriter(str(self._folder), purge_step=done + 1 if done else None)

    def round_finished(self, record: Mapping[str, Any]) -> None:
        step = record["round"]
        for name in ("train_loss", "bytes_up", "bytes_down", "seconds", "learning_rate", "peak_memory_mb"):
            if record.get(name) is not None:
                self._writer.add_scalar(f"round/{name}", record[name], step)
        if scores := record.get("validation"):
            for group in ("global", "mean"):
                for name, value in scores[group].items():
                    if value is not None:
                        self._writer.add_scalar(f"validation_{group}/{name}", value, step)
            for client, metrics in list(scores["clients"].items())[:50]:
                if metrics["loss"] is not None:
                    self._writer.add_scalar(f"client_loss/{client}", metrics["loss"], step)
        self._writer.flush()

    def finished(self, status: str) -> None:
        self._writer.close()
