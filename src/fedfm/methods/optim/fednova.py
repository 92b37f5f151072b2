"""FedNova: Wang et al. 2020, Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization
(arXiv 2007.07481).

Clients that take more local steps pull the mean towards their own optimum. Each change is divided by the steps behind
it, and the mean multiplied by the mean number of steps.

Differences from the paper:
- The change is divided by $a_k$ alone, not by the learning rate, which is the same for all and cancels.
- $a_k$ is that of plain SGD, with the proximal formula when ``mu`` is above 0; local momentum is not offered. With
  AdamW the number of steps is used, a heuristic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedfm.core import trees
from fedfm.core.jobs import Fit, Fitted, Term
from fedfm.core.method import Client, Method, Paper, Rule, State, Work
from fedfm.core.plan import Plan
from fedfm.core.terms import Proximal
from fedfm.core.update import Kind, Tensors, Update
from fedfm.errors import RecipeError, require


@dataclass(frozen=True)
class FedNova(Method):
    """$w \\leftarrow w + \\left( \\sum_k p_k a_k \\right) \\sum_k p_k (w_k - w) / a_k$ with $a_k = \\tau_k$ steps, or
    $a_k = (1 - (1 - \\eta \\mu)^{\\tau_k}) / (\\eta \\mu)$ with a proximal term.

    Args:
        mu: $\\mu$ of the proximal term; 0 for none.
    """

    paper: ClassVar[Paper | None] = Paper(
        title="Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization",
        authors="Wang, Liu, Liang, Joshi, Poor",
        year=2020,
        venue="NeurIPS",
        arxiv="2007.07481",
    )
    # The number of steps goes with the changes and must not be clipped or compressed like them.
    sends: ClassVar[Kind] = Kind.KNOWLEDGE
    up: ClassVar[str] = "the change of every tuned tensor by step, and the number of steps"

    mu: float = 0.0

    def __post_init__(self) -> None:
        require(self, "mu", 0 <= self.mu < math.inf, "at least 0 and finite")

    def plan(self, plan: Plan) -> Plan:
        """See that the proximal term does not overshoot, as $a_k$ is then no sum of positive terms."""
        if plan.training.learning_rate * self.mu >= 1:
            raise RecipeError(
                "FedNova needs training.learning_rate times mu below 1, but they are "
                f"{plan.training.learning_rate:g} and {self.mu:g}. Lower one of them."
            )
        return plan

    def terms(self, client: Client, message: Tensors) -> tuple[Term, ...]:
        """The proximal term, if there is one."""
        return (Proximal(self.mu, message),) if self.mu else ()

    def expects(self, phase: str, message: Tensors) -> Tensors:
        return {**message, "steps": torch.zeros(1)}

    def local(self, client: Client, message: Tensors) -> Work:
        fitted = yield Fit(message, train=self.train, terms=self.terms(client, message))
        steps = self.normaliser(fitted)
        change = trees.scale(trees.subtract(fitted.tensors, message), 1 / steps)
        payload = {**change, "steps": torch.tensor([steps])}
        return Update(payload, weight=client.member.examples, metrics=fitted.metrics, kind=self.sends)

    def normaliser(self, fitted: Fitted) -> float:
        """$a_k$."""
        decay = fitted.learning_rate * self.mu
        return (1 - (1 - decay) ** fitted.steps) / decay if decay else float(fitted.steps)

    def apply(self, state: State, combined: Update, rule: Rule) -> State:
        """The mean change by step, times the mean number of steps."""
        change = trees.scale(trees.without(combined.tensors, ("steps",)), float(combined.tensors["steps"]))
        return super().apply(state, replace(combined, tensors=change), rule)
