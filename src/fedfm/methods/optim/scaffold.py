"""SCAFFOLD: Karimireddy et al. 2020, SCAFFOLD: Stochastic Controlled Averaging for Federated Learning
(arXiv 1910.06378).

Each client corrects its gradients by the difference of the server's control variate and its own, so that local steps go
where the mean of all clients would go.

Differences from the paper:
- The correction is the linear term $\\langle c - c_k, v \\rangle$ of the loss, whose gradient it is.
- Option II of the paper for the control variates (from the change of the weights); option I, a gradient at the received
  weights, is not offered.
- The server's learning rate $\\eta_g$ is that of the server rule.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from fedfm.core import trees
from fedfm.core.jobs import Fit, Term
from fedfm.core.method import Client, Method, Paper, Rule, State, Work
from fedfm.core.plan import Plan
from fedfm.core.space import Layout
from fedfm.core.terms import Linear
from fedfm.core.traits import Trait, Traits
from fedfm.core.update import Member, Tensors, Update
from fedfm.errors import RecipeError


@dataclass(frozen=True)
class Controlled(State):
    """State of SCAFFOLD.

    Args:
        control: $c$, by name.
        clients: $N$.
    """

    control: Tensors = field(default_factory=dict)
    clients: int = 1


@dataclass(frozen=True)
class Scaffold(Method):
    """$y \\leftarrow y - \\eta (\\nabla F_k(y) - c_k + c)$ for $K$ steps,
    $c_k' = c_k - c + (w - y) / (K \\eta)$; on the server $w \\leftarrow w + \\eta_g \\frac{1}{m} \\sum_k (y_k - w)$
    and $c \\leftarrow c + \\frac{1}{N} \\sum_k (c_k' - c_k)$."""

    paper: ClassVar[Paper | None] = Paper(
        title="SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
        authors="Karimireddy, Kale, Mohri, Reddi, Stich, Suresh",
        year=2020,
        venue="ICML",
        arxiv="1910.06378",
    )
    traits: ClassVar[Traits] = Method.traits - {Trait.FORGETFUL}
    up: ClassVar[str] = "the change of every tuned tensor and of its control variate"
    down: ClassVar[str] = "every tuned tensor and its control variate"

    def plan(self, plan: Plan) -> Plan:
        """See that local steps are plain SGD, of which the control variates are gradients."""
        training = plan.training
        if training.optim != "sgd" or training.max_grad_norm or training.weight_decay:
            raise RecipeError(
                f"{self.id} corrects the gradients of plain SGD, so training.optim must be sgd and max_grad_norm and "
                f"weight_decay 0, but they are {training.optim}, {training.max_grad_norm:g} and "
                f"{training.weight_decay:g}. Set them, or choose fedprox or feddyn, which take any optimizer."
            )
        return plan

    def start(self, space: Layout) -> Controlled:
        weights = trees.select(space.initial, self.share)
        zeros = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
        return Controlled(weights, control=zeros, clients=space.clients)

    def message(self, state: State, member: Member) -> Tensors:
        assert isinstance(state, Controlled)
        return {**state.weights, **trees.mark("c", state.control)}

    def terms(self, client: Client, message: Tensors) -> tuple[Term, ...]:
        """The correction of the gradient, $c - c_k$."""
        control, own = trees.marked("c", message), trees.marked("", client.private)
        return (Linear(trees.subtract(control, own) if own else control),)

    def local(self, client: Client, message: Tensors) -> Work:
        before = self.compose(client, message)
        fitted = yield Fit(before, train=self.train, terms=self.terms(client, message))
        change = trees.subtract(fitted.tensors, before)
        moved = trees.scale(trees.marked("c", message), -1.0)
        moved = trees.add(moved, change, -1 / (fitted.steps * fitted.learning_rate))
        client.keep(trees.total((client.private, moved)))
        return Update({**change, **trees.mark("c", moved)}, weight=1.0, metrics=fitted.metrics)

    def apply(self, state: State, combined: Update, rule: Rule) -> State:
        assert isinstance(state, Controlled)
        weights, memory = rule(state.weights, trees.marked("", combined.tensors), state.memory)
        control = trees.add(state.control, trees.marked("c", combined.tensors), combined.weight / state.clients)
        return replace(state, weights=weights, memory=memory, control=control)
