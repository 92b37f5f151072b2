"""FedDC: Gao et al. 2022, FedDC: Federated Learning with Non-IID Data via Local Drift Decoupling and Correction
(arXiv 2203.11751).

Each client learns how far it drifts from the global model and trains with a penalty that allows for that drift; the
server puts the mean drift back. Gradients are corrected by control variates, as in SCAFFOLD.

Differences from the paper:
- The drift that the server puts back is the mean over all clients, also those that did not take part, as in the
  authors' code; Algorithm 1 adds the drifts of the participants, which pulls the model to whoever was drawn last.
- The correction is by control variates that a client updates from what it was told and what it did, as in the authors'
  code; the text takes the changes of the last round, which are the same when everybody takes part in each round.
- Clients count the same, as in the authors' code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, cast

import torch

from fedfm.core import trees
from fedfm.core.jobs import Term
from fedfm.core.method import Client, Paper, Rule, State, Work
from fedfm.core.space import Layout
from fedfm.core.terms import Proximal
from fedfm.core.update import Tensors, Update
from fedfm.errors import require
from fedfm.methods.optim.scaffold import Controlled, Scaffold


@dataclass(frozen=True)
class Decoupled(Controlled):
    """State of FedDC.

    Args:
        drift: $h$, the mean over all clients of their drifts, by name.
    """

    drift: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class FedDC(Scaffold):
    """$w_k \\approx \\arg\\min_v F_k(v) + \\frac{\\alpha}{2} \\lVert h_k + v - w \\rVert^2 +
    \\langle v, c - c_k \\rangle$ and $h_k \\leftarrow h_k + w_k - w$; on the server
    $w \\leftarrow \\frac{1}{m} \\sum_k w_k + \\frac{1}{N} \\sum_k h_k$, and control variates as in SCAFFOLD.

    Args:
        alpha: $\\alpha$, weight of the drift penalty; the paper's are 0.005 to 0.1.
    """

    paper: ClassVar[Paper | None] = Paper(
        title="FedDC: Federated Learning with Non-IID Data via Local Drift Decoupling and Correction",
        authors="Gao, Fu, Li, Chen, Xu, Xu",
        year=2022,
        venue="CVPR",
        arxiv="2203.11751",
    )

    alpha: float = 0.01

    def __post_init__(self) -> None:
        require(self, "alpha", 0 <= self.alpha < math.inf, "at least 0 and finite")

    def start(self, space: Layout) -> Decoupled:
        weights = trees.select(space.initial, self.share)
        zeros = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
        return Decoupled(weights, control=zeros, clients=space.clients, drift=zeros)

    def terms(self, client: Client, message: Tensors) -> tuple[Term, ...]:
        """The penalty around the weights less the drift, and the correction of the gradient."""
        weights, drift = trees.marked("", message), trees.marked("h", client.private)
        return Proximal(self.alpha, trees.subtract(weights, drift) if drift else weights), *super().terms(
            client, message
        )

    def local(self, client: Client, message: Tensors) -> Work:
        update = yield from super().local(client, message)
        change, control = trees.marked("", update.tensors), trees.marked("c", update.tensors)
        client.keep(trees.total((client.private, control, trees.mark("h", change))))
        return update

    def apply(self, state: State, combined: Update, rule: Rule) -> State:
        assert isinstance(state, Decoupled)
        share = combined.weight / state.clients
        drift = trees.add(state.drift, trees.marked("", combined.tensors), share)
        after = cast(Decoupled, super().apply(state, combined, rule))
        return replace(after, weights=trees.add(after.weights, drift), drift=drift)
