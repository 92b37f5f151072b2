"""Peak memory of a process and all that it started, also of what went away from it, such as Ray's workers.

Who belongs together is told by a mark in the environment, which children inherit, so a process that was adopted by
another one is found too. Read from ``/proc``: on Linux only.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

PROC = Path("/proc")
EVERY_S = 0.05
"""Seconds from one look to the next."""
SHARE = 0.04
"""Most of one core that looking may take; it waits longer where a look is dear, as with many large processes."""


def marked(mark: bytes, known: dict[str, bool]) -> list[str]:
    """Ids of the processes with a mark in their environment.

    Args:
        mark: such as ``b"NAME=value"``.
        known: what was found before, by process id; those that ended are taken out.
    """
    now = [entry for entry in os.listdir(PROC) if entry.isdigit()] if PROC.exists() else []
    for gone in known.keys() - set(now):
        del known[gone]
    for pid in now:
        # Between fork and exec a child has its parent's environment, so what was found once stays true.
        if not known.get(pid):
            try:
                known[pid] = mark in (PROC / pid / "environ").read_bytes().split(b"\0")
            except OSError:
                known[pid] = False
    return [pid for pid in now if known[pid]]


def proportional_mb(pid: str) -> float:
    """Proportional set size in MB: memory that n processes share counts for one nth in each; 0 when it has ended."""
    try:
        text = (PROC / pid / "smaps_rollup").read_text()
    except OSError:
        return 0.0
    line = next((line for line in text.splitlines() if line.startswith("Pss:")), "Pss: 0 kB")
    return int(line.split()[1]) * 1024 / 1e6


class Watch:
    """Looks at all processes with a mark until :meth:`stop`.

    Args:
        mark: such as ``NAME=value``.
    """

    def __init__(self, mark: str) -> None:
        self._mark = mark.encode()
        self._known: dict[str, bool] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.peak_mb = 0.0
        self.processes = 0

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def _look(self) -> None:
        wait = 0.0
        while not self._over.wait(wait):
            began = time.thread_time()
            found = [mb for mb in map(proportional_mb, marked(self._mark, self._known)) if mb]
            self.peak_mb = max(self.peak_mb, sum(found))
            self.processes = max(self.processes, len(found))
            wait = max(EVERY_S, (time.thread_time() - began) / SHARE)

    def stop(self) -> None:
        """Look no more, and end what the marked processes left behind."""
        self._over.set()
        self._thread.join()
        for sign in (signal.SIGTERM, signal.SIGKILL):
            left = marked(self._mark, {})
            for pid in left:
                try:
                    os.kill(int(pid), sign)
                except ProcessLookupError:
                    continue
            deadline = time.monotonic() + 5 * bool(left)
            while time.monotonic() < deadline and marked(self._mark, {}):
                time.sleep(0.1)
