"""FedDC: Gao et al. 2022, FedDC: Federated Learning with Non-IID Data via Local Drift Decoupling and Correction
(arXiv 2203.11751).

Each client learns how far it drifts from the global model, trains with a penalty that allows for that drift, and sends
its weights with the drift put back. A linear term corrects its gradients by what clients did in the round before.

Differences from the paper:
- A client sends changes instead of weights.
- Changes are kept per unit of $\\eta K$ (learning rate times steps) instead of being divided by it when used; with the
  same steps in all rounds this is the same, and clients of different pace remain comparable.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from fedfm.core import trees
from fedfm.core.jobs import Fit, Term
from fedfm.core.method import Client, Method, Paper, Rule, State, Work
from fedfm.core.space import Layout
from fedfm.core.terms import Linear, Proximal
from fedfm.core.traits import Trait, Traits
from fedfm.core.update import Member, Tensors, Update


@dataclass(frozen=True)
class Decoupled(State):
    """State of FedDC.

    Args:
        pull: $g$, the mean change of the last round, per unit of $\\eta K$.
    """

    pull: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class FedDC(Method):
    """$w_k \\approx \\arg\\min_v F_k(v) + \\frac{\\alpha}{2} \\lVert h_k + v - w \\rVert^2 +
    \\langle v, g_k - g \\rangle$ and $h_k \\leftarrow h_k + w_k - w$; on the server
    $w \\leftarrow \\sum_k p_k (w_k + h_k)$ and $g \\leftarrow \\sum_k p_k g_k$.

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
    traits: ClassVar[Traits] = Method.traits - {Trait.FORGETFUL}
    up: ClassVar[str] = "the change of every tuned tensor with the drift, and the change alone"
    down: ClassVar[str] = "every tuned tensor and the mean change"

    alpha: float = 0.01

    def start(self, space: Layout) -> Decoupled:
        weights = trees.select(space.initial, self.share)
        return Decoupled(weights, pull={name: torch.zeros_like(tensor) for name, tensor in weights.items()})

    def message(self, state: State, member: Member) -> Tensors:
        assert isinstance(state, Decoupled)
        return {**state.weights, **trees.mark("g", state.pull)}

    def terms(self, client: Client, message: Tensors) -> tuple[Term, ...]:
        """The penalty around the weights less the drift, and the correction of the gradient."""
        weights, pull = trees.marked("", message), trees.marked("g", message)
        drift, own = trees.marked("h", client.private), trees.marked("g", client.private)
        center = trees.subtract(weights, drift) if drift else weights
        slope = trees.subtract(own, pull) if own else trees.scale(pull, -1.0)
        return Proximal(self.alpha, center), Linear(slope)

    def local(self, client: Client, message: Tensors) -> Work:
        before = self.compose(client, message)
        fitted = yield Fit(before, train=self.train, terms=self.terms(client, message))
        change = trees.subtract(fitted.tensors, before)
        drift = trees.marked("h", client.private)
        drift = trees.add(drift, change) if drift else change
        own = trees.scale(change, 1 / (fitted.learning_rate * fitted.steps))
        client.keep({**trees.mark("h", drift), **trees.mark("g", own)})
        payload = {**trees.add(change, drift), **trees.mark("g", own)}
        return Update(payload, weight=client.member.examples, metrics=fitted.metrics)

    def apply(self, state: State, combined: Update, rule: Rule) -> State:
        assert isinstance(state, Decoupled)
        weights, memory = rule(state.weights, trees.marked("", combined.tensors), state.memory)
        return replace(state, weights=weights, memory=memory, pull=trees.marked("g", combined.tensors))
