"""The folder of a run.

============== ====================================================================
recipe.yaml    the resolved recipe
data.json      manifest of the data: sizes and hashes, never rows
metrics.jsonl  one line a round
status.json    ``completed``, ``failed`` or ``stopped``, and why; absent while it runs
checkpoints/   the last two rounds
clients/       private state of clients
final/         the result: a PEFT adapter, or a whole model
============== ====================================================================
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from fedfm.errors import StoreError
from fedfm.store.checkpoint import Checkpoints
from fedfm.store.clients import ClientStore
from fedfm.store.files import write_bytes, write_json, writing


class RunFolder:
    """One run's files. Holds a lock, so that no two processes write the same run.

    Args:
        path: the folder; made when absent.
        resume: go on with what is there.
        overwrite: remove what an earlier run left there.

    Raises:
        StoreError: the folder holds an earlier run and neither was asked for, or another process is writing it.
    """

    def __init__(self, path: Path | str, resume: bool = False, overwrite: bool = False) -> None:
        self.path = Path(path)
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self._lock = self._acquire()
        if not resume:
            self._clear(overwrite)
        self.checkpoints = Checkpoints(self.path / "checkpoints")
        self.clients = ClientStore(self.path / "clients")

    @property
    def final(self) -> Path:
        """Where the result goes."""
        return self.path / "final"

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a line to ``metrics.jsonl``."""
        with writing(self.path / "metrics.jsonl"), (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """The whole lines of ``metrics.jsonl``."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def rewind(self, round: int) -> None:
        """Forget what was written after ``round``."""
        kept = [r for r in self.records() if r["round"] <= round]
        text = "".join(json.dumps(r, allow_nan=False) + "\n" for r in kept)
        write_bytes(self.path / "metrics.jsonl", text.encode())
        self.clients.rewind(round)
        (self.path / "status.json").unlink(missing_ok=True)

    def finish(self, status: str, reason: str = "") -> None:
        """Write ``status.json``."""
        write_json(self.path / "status.json", {"status": status, "reason": reason})

    def close(self) -> None:
        """Release the lock."""
        self._lock.close()

    def _acquire(self) -> IO[str]:
        with writing(self.path / ".lock"):
            lock = (self.path / ".lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise StoreError(
                f"another process is writing {self.path}. Wait for it, or choose another output_dir."
            ) from error
        return lock

    def _clear(self, overwrite: bool) -> None:
        present = [p for p in self.path.iterdir() if p.name != ".lock"]
        if not present:
            return
        ours = (self.path / "metrics.jsonl").exists() or (self.path / "recipe.yaml").exists()
        if not overwrite or not ours:
            self._lock.close()
            what = "holds an earlier run" if ours else "holds other files"
            tip = "Go on with it by --resume, replace it by --overwrite, or" if ours else "Please"
            raise StoreError(f"{self.path} {what}. {tip} choose another output_dir.")
        with writing(self.path):
            for item in present:
                shutil.rmtree(item) if item.is_dir() else item.unlink()
