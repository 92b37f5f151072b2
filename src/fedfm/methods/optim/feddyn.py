"""FedDyn: Acar et al. 2021, Federated Learning Based on Dynamic Regularization (arXiv 2111.04263).

Each client's loss gets a linear and a proximal term, so that where the global loss is stationary every client's is,
too: clients stop pulling towards their own optima. The server corrects the mean by what clients moved in all rounds.

Differences from the paper:
- A client sends the change of the weights instead of the weights.
- The signs are those of $g_k$ as the gradient of the client's own loss at its own optimum; the paper's code scales the
  linear term by examples, which its text does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

from fedfm.core import trees
from fedfm.core.jobs import Fit, Term
from fedfm.core.method import Client, Method, Paper, Rule, State, Work
from fedfm.core.space import Layout
from fedfm.core.terms import Linear, Proximal
from fedfm.core.traits import Trait, Traits
from fedfm.core.update import Tensors, Update
from fedfm.errors import require


@dataclass(frozen=True)
class Dynamic(State):
    """State of FedDyn.

    Args:
        drift: $h$, the mean over all clients of what :class:`FedDyn` keeps on them, by name.
        clients: $N$.
    """

    drift: Tensors = field(default_factory=dict)
    clients: int = 1


@dataclass(frozen=True)
class FedDyn(Method):
    """$w_k \\approx \\arg\\min_v F_k(v) - \\langle g_k, v \\rangle + \\frac{\\alpha}{2} \\lVert v - w \\rVert^2$,
    $g_k \\leftarrow g_k - \\alpha (w_k - w)$; on the server $h \\leftarrow h - \\frac{\\alpha}{N} \\sum_k (w_k - w)$
    and $w \\leftarrow \\frac{1}{m} \\sum_k w_k - h / \\alpha$.

    Args:
        alpha: $\\alpha$; the paper's are 0.1, 0.01, 0.001.
    """

    paper: ClassVar[Paper | None] = Paper(
        title="Federated Learning Based on Dynamic Regularization",
        authors="Acar, Zhao, Matas Navarro, Mattina, Whatmough, Saligrama",
        year=2021,
        venue="ICLR",
        arxiv="2111.04263",
    )
    traits: ClassVar[Traits] = Method.traits - {Trait.FORGETFUL}

    alpha: float = 0.1

    def __post_init__(self) -> None:
        require(self, "alpha", 0 < self.alpha < math.inf, "above 0 and finite")

    def start(self, space: Layout) -> Dynamic:
        weights = super().start(space).weights
        return Dynamic(weights, drift=trees.scale(weights, 0.0), clients=space.clients)

    def terms(self, client: Client, message: Tensors) -> tuple[Term, ...]:
        """The proximal term, and from the second time on the linear one."""
        return Proximal(self.alpha, message), Linear(trees.scale(client.private, -1.0))

    def local(self, client: Client, message: Tensors) -> Work:
        fitted = yield Fit(message, train=self.train, terms=self.terms(client, message))
        change = trees.subtract(fitted.tensors, message)
        client.keep(trees.total((client.private, trees.scale(change, -self.alpha))))
        return Update(change, weight=1.0, metrics=fitted.metrics)

    def apply(self, state: State, combined: Update, rule: Rule) -> State:
        assert isinstance(state, Dynamic)
        drift = trees.add(state.drift, combined.tensors, -self.alpha * combined.weight / state.clients)
        weights, memory = rule(state.weights, combined.tensors, state.memory)
        return replace(state, weights=trees.add(weights, drift, -1 / self.alpha), memory=memory, drift=drift)
