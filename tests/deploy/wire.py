"""A wire between SuperNodes and SuperLink on which connections break and stall."""

from __future__ import annotations

import random
import socket
import threading
import time
from contextlib import suppress


class Wire:
    """Passes TCP connections on to an address.

    Args:
        target: ``host:port``.
        loss: chance that a piece of data of either side ends the connection instead of arriving.
        stall: chance that it waits first.
        stall_s: for how long.
        seed: of the chances.
    """

    def __init__(self, target: str, loss: float = 0.0, stall: float = 0.0, stall_s: float = 5.0, seed: int = 0) -> None:
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self.loss, self.stall, self.stall_s = loss, stall, stall_s
        self._draw = random.Random(seed)
        self._door = socket.socket()
        self._door.bind(("127.0.0.1", 0))
        self._door.listen(64)
        self.broken = self.stalled = 0
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self._door.getsockname()[1]}"

    def close(self) -> None:
        """Take no more connections."""
        self._door.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._door.accept()
                try:
                    far = socket.create_connection(self._target)
                except OSError:
                    near.close()
                    continue
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=(one, other), daemon=True).start()

    def _carry(self, one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(1 << 16):
                if self._draw.random() < self.loss:
                    self.broken += 1
                    break
                if self._draw.random() < self.stall:
                    self.stalled += 1
                    time.sleep(self.stall_s)
                other.sendall(data)
        for line in (one, other):
            with suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
