"""Logs of deployed processes: one JSON object a line, with run, round and site where there are any."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from fedfm.observe.observer import Observer

log = logging.getLogger("fedfm")


class Lines(logging.Formatter):
    """Writes a record as JSON: time in seconds since 1970, level, message, and what ``extra={"about": ...}`` says."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": round(record.created, 3), "level": record.levelname.lower(), "message": record.getMessage()}
        line |= getattr(record, "about", {})
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def begin(to: IO[str] | Path) -> None:
    """Send what fedfm logs to a stream, or to the end of a file; what was set before is replaced."""
    handler = logging.FileHandler(to) if isinstance(to, Path) else logging.StreamHandler(to)
    handler.setFormatter(Lines())
    for old in log.handlers[:]:
        log.removeHandler(old)
        old.close()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


class RoundLog(Observer):
    """Logs the rounds of a run.

    Args:
        run: its name.
    """

    def __init__(self, run: str) -> None:
        self.run = run

    def round_finished(self, record: Mapping[str, Any]) -> None:
        """One line for the round, one for each client that was dropped."""
        about = {"run": self.run, "round": record["round"]}
        told = {k: record[k] for k in ("seconds", "train_loss", "bytes_up", "bytes_down") if k in record}
        sites = list(record.get("participants", {}))
        log.info("round finished", extra={"about": about | told | {"sites": sites}})
        for one in record.get("dropped", ()):
            log.warning("dropped", extra={"about": about | {"site": one["client"], "reason": one["reason"]}})

    def finished(self, status: str) -> None:
        """How the run ended."""
        log.info("run ended", extra={"about": {"run": self.run, "status": status}})
