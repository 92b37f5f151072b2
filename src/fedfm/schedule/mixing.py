"""FedAsync: Xie et al. 2019, Asynchronous Federated Optimization (arXiv 1903.03934).

Each upload is mixed into the model as soon as it arrives, the less of it, the older the model from which it started.

Differences from the paper:
- A client sends the change of its weights; the server adds it to the message from which that client started, so the
  mixed weights are the paper's up to rounding.
- The paper draws staleness itself at random, up to a maximum; here it follows from the clients' speeds.
- The paper also lowers $\\alpha$ during training; here it stays, and the run's learning rate may fall.
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
class Mixing(Asynchronous):
    """$w \\leftarrow (1 - \\alpha_t) w + \\alpha_t w_k$ with $\\alpha_t = \\alpha \\, s(u)$, at each arrival.

    As a change, so that the server rule may do more than add it: $\\Delta = \\alpha_t (w_k - w)$.

    Args:
        alpha: $\\alpha$, above 0 and at most 1.
        concurrency: tasks in flight; 0 means as many as the sampler draws.
        discount: $s(u)$ by its name: ``constant``, ``polynomial`` or ``hinge``.
        power: $c$ of the polynomial discount.
        slope: $a$ of the hinge.
        grace: $b$ of the hinge, in versions.
        max_staleness: uploads with more versions than this between start and arrival are dropped; -1 drops none.
        sigma: standard deviation of the logarithm of devices' speeds.
        jitter: the same of what a single task adds as a factor.
    """

    id: ClassVar[str] = "mixing"

    alpha: float = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "alpha", 0 < self.alpha <= 1, "above 0 and at most 1")

    @property
    def wanted(self) -> int:
        return 1

    def use(self, method: Method, server: RoundServer, state: State, arrivals: Sequence[Arrival]) -> State:
        (one,) = arrivals
        now = method.message(state, one.member)
        # What the model has moved since the start is taken back from the change; nothing, when none came between.
        gone = {n: trees.wide(now[n]) - trees.wide(one.start[n]) for n in one.update.tensors}
        mixed = trees.scale(trees.subtract(one.update.tensors, gone), self.alpha * self.weight(one.staleness))
        combined = method.combine(state, [replace(one.update, tensors=mixed)], server.mean)
        return method.apply(state, combined, server.rule)
