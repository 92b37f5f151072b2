"""Flower's simulation runtime on Ray, held open while this process leads the rounds.

``run_simulation`` calls a ServerApp and comes back when that is over, but rounds and Ctrl-C belong to the main thread.
So it runs in a thread, and its ServerApp hands out the grid and waits for the end. Ray's processes die with the thread
that made them, so it lives as long as the simulation.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from itertools import cycle
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import torch
from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from fedfm.errors import FedfmError, RecipeError
from fedfm.links.flower.ray import RayLink
from fedfm.links.flower.ray_worker import Build, bell, client_app
from fedfm.links.link import Link

if TYPE_CHECKING:
    from fedfm.federation import Federation

NODES = 64
"""Flower's nodes, each of which is handed a share every tenth of a second. Which worker does it is another matter."""
PAUSE_S = 0.02
"""Seconds between two looks for a reply."""
FOREVER_S = 1e9
"""Seconds that a share may be under way."""


# Read when Ray is loaded. Workers are told their device, so a GPU that they do not use need not be hidden from them.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


class Simulation:
    """A Ray cluster at work for federations, from their first question to the end of a ``with`` block.

    The cluster is that of ``RAY_ADDRESS``, or the one that ``ray start`` made on this machine, or one made for the
    purpose. It has a worker for each core; where ``OMP_NUM_THREADS`` is set, for each so many cores; on CUDA, for each
    GPU. Flower keeps no more of them busy than 32, or the cores of this machine and 4.

    Args:
        build: makes the same federations in a worker.
        federations: by the id of their method; inside the block they reach their clients by this simulation.

    Raises:
        RecipeError: Ray is not installed, or the system is Windows.
    """

    def __init__(self, build: Build, federations: Mapping[str, Federation]) -> None:
        if sys.platform == "win32":
            raise RecipeError("engine ray does not run on Windows. Use WSL 2, or engine fused.")
        if find_spec("ray") is None:
            raise RecipeError('engine ray needs Ray: pip install "fedfm[ray]".')
        self.build = build
        self.federations = federations
        self.threads = torch.get_num_threads() if os.environ.get("OMP_NUM_THREADS") else 1
        self.resources: dict[str, float] = {"num_cpus": self.threads, "num_gpus": 0.0}
        self._usual = {id: federation.link for id, federation in federations.items()}
        self._over = threading.Event()
        self._grids: SimpleQueue[Grid] = SimpleQueue()
        self._fault: BaseException | None = None
        self._bell: Any = None
        self._workers = 0
        self._thread = threading.Thread(target=self._run, name="simulation", daemon=True)

    def __enter__(self) -> Simulation:
        for federation in self.federations.values():
            federation.link = self.link
            if federation.trainer.device.type == "cuda":
                self.resources["num_gpus"] = 1.0
        return self

    def __exit__(self, *exception: object) -> None:
        for id, link in self._usual.items():
            self.federations[id].link = link
        self._over.set()
        if self._bell is not None:
            import ray

            ray.kill(self._bell)
            self._thread.join()

    @property
    def link(self) -> type[Link]:
        """What a ``Federation`` takes as its link."""

        class Here(RayLink):
            def __init__(here, *args: Any, **kwargs: Any) -> None:  # noqa: N805
                super().__init__(*args, simulation=self, **kwargs)

        return Here

    def workers(self, pulse: Callable[[int], None]) -> int:
        """How many workers are busy at a time. At first it starts the cluster, and waits as :meth:`reply` does."""
        if self._workers == 0:
            import ray

            _answers(os.environ.get("RAY_ADDRESS", ""))
            self._thread.start()
            while self._grids.empty() or not ray.is_initialized():
                self._wait(pulse)
            self._grid = self._grids.get()
            self._nodes = cycle(self._grid.get_node_ids())
            self._bell = bell()
            fitting = sum(self._fitting(node["Resources"]) for node in ray.nodes())
            if not fitting:
                needs = f"{self.threads} cores" + (" and a GPU" if self.resources["num_gpus"] else "")
                raise FedfmError(f"no machine of the Ray cluster has {needs} for a worker. Set OMP_NUM_THREADS lower.")
            self._workers = min(fitting, 32, (os.cpu_count() or 1) + 4)
        return self._workers

    def send(self, content: RecordDict) -> str:
        """Put a share under way; returns its number."""
        [number] = self._grid.push_messages([Message(content, next(self._nodes), "train", ttl=FOREVER_S)])
        return number

    def reply(self, number: str, pulse: Callable[[int], None]) -> Any:
        """What came back for a share.

        Args:
            number: of the share.
            pulse: called while waiting; may raise.

        Raises:
            FedfmError: Ray cannot be used, or a worker died.
        """
        while not (came := list(self._grid.pull_messages([number]))):
            self._wait(pulse)
        if came[0].has_error():
            # Flower says the class of the error, then its text in :<'...'>.
            reason = (came[0].error.reason or "").partition(":<'")[2]
            raise FedfmError(f"a Ray worker failed: {_line(reason)}. The last finished round is kept.")
        return came[0].content

    def _fitting(self, machine: Mapping[str, float]) -> int:
        """How many workers fit on a machine, as Flower counts them."""
        needs = [("CPU", self.resources["num_cpus"]), ("GPU", self.resources["num_gpus"])]
        return min(int(machine.get(name, 0) / needed) for name, needed in needs if needed)

    def _wait(self, pulse: Callable[[int], None]) -> None:
        pulse(0)
        if not self._thread.is_alive():
            raise FedfmError(f"Ray cannot be used: {_line(self._fault)}.") from self._fault
        time.sleep(PAUSE_S)

    def _run(self) -> None:
        """The thread: all that Flower and Ray do in this process."""
        app = ServerApp()

        @app.main()
        def main(grid: Grid, context: Context) -> None:
            self._grids.put(grid)
            self._over.wait()

        # What goes wrong is raised where it is waited for.
        log = logging.getLogger("flwr")
        before = log.level
        log.setLevel(logging.CRITICAL + 1)
        config: dict[str, Any] = {
            "init_args": {"logging_level": "ERROR", "log_to_driver": False},
            "client_resources": self.resources,
        }
        try:
            run_simulation(app, client_app(self.build, self.threads), NODES, backend_config=config)
        except BaseException as error:
            self._fault = error
        finally:
            self._over.set()
            log.setLevel(before)


def _answers(address: str) -> None:
    """See that something listens where the cluster should be: Ray itself would try for ten minutes.

    Raises:
        FedfmError: nothing does.
    """
    host, _, port = address.rpartition(":")
    if "/" not in host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise FedfmError(f"no Ray cluster answers at RAY_ADDRESS, which is {address}: {error}.") from error


def _line(fault: BaseException | str | None) -> str:
    """The first cause of a fault, in one line."""
    while isinstance(fault, BaseException) and fault.__cause__:
        fault = fault.__cause__
    lines = [line.strip() for line in str(fault).splitlines() if line.strip()]
    return (lines or [repr(fault)])[0].rstrip(".")
