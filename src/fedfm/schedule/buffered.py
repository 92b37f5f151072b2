"""FedBuff: Nguyen et al. 2022, Federated Learning with Buffered Asynchronous Aggregation (arXiv 2106.06639).

Clients work at their own pace; the server acts as soon as its buffer holds so many uploads, and does not wait for the
slow ones. An upload counts the less, the older the model from which it started.

Differences from the paper:
- The paper hides single uploads in the buffer by secure aggregation; here the server sees them.
- A client is not asked twice at one version, so a buffer larger than the number of clients is used as soon as nobody
  is left to ask; the paper has millions of clients.
- Durations are log-normal by device; the paper draws them half-normal, after what was measured on its fleet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from fedfm.core import trees
from fedfm.core.method import Method, State
from fedfm.errors import require
from fedfm.schedule.clock import Arrival, Asynchronous

if TYPE_CHECKING:
    from fedfm.server import RoundServer


@dataclass(frozen=True)
class Buffered(Asynchronous):
    """$\\Delta = \\frac{1}{M} \\sum_k s(u_k) \\Delta_k$ over the $M$ uploads in the buffer; then ``apply``.

    The division is by $M$ and not by $\\sum_k s(u_k)$, so a buffer of stale uploads makes a smaller step.

    Args:
        buffer: $M$, uploads for one server update; $K$ in the paper.
        concurrency: tasks in flight; 0 means as many as the sampler draws.
        discount: $s(u)$ by its name: ``constant``, ``polynomial`` or ``hinge``.
        power: $c$ of the polynomial discount; the paper's $1 / \\sqrt{1 + u}$ is 1/2.
        slope: $a$ of the hinge.
        grace: $b$ of the hinge, in versions.
        max_staleness: uploads with more versions than this between start and arrival are dropped; -1 drops none.
        sigma: standard deviation of the logarithm of devices' speeds.
        jitter: the same of what a single task adds as a factor.
    """

    id: ClassVar[str] = "buffered"

    buffer: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "buffer", self.buffer >= 1, "at least 1")

    @property
    def wanted(self) -> int:
        return self.buffer

    def use(self, method: Method, server: RoundServer, state: State, arrivals: Sequence[Arrival]) -> State:
        scaled = [
            replace(a.update, tensors=trees.scale(a.update.tensors, self.weight(a.staleness)), weight=1.0)
            for a in arrivals
        ]
        return method.apply(state, method.combine(state, scaled, server.mean), server.rule)
