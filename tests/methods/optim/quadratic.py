"""Clients with quadratic losses: small enough to work out rounds by hand, unlike enough to pull apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fedfm.core.client import View, work
from fedfm.core.jobs import Fit, Fitted, Gradient, Gradients, Job
from fedfm.core.mean import WeightedMean
from fedfm.core.method import Method
from fedfm.core.space import Layout
from fedfm.core.update import Member, Tensors, Update
from fedfm.rules import Add


@dataclass
class Quadratics:
    """Clients k with $F_k(v) = \\frac{a_k}{2} \\lVert v - t_k \\rVert^2$, trained by plain gradient descent on ``w``.

    Args:
        targets: $t_k$, of two coordinates, by client.
        curvature: $a_k$; 1 where it is not named.
        rate: local learning rate.
        steps: local steps, of all or by client.
        examples: $n_k$; 1 where it is not named.
        private: what clients keep.
        jobs: what was asked of them.
    """

    targets: Mapping[str, tuple[float, float]]
    curvature: Mapping[str, float] = field(default_factory=dict)
    rate: float = 0.1
    steps: int | Mapping[str, int] = 1
    examples: Mapping[str, int] = field(default_factory=dict)
    private: dict[str, Tensors] = field(default_factory=dict)
    jobs: list[Job] = field(default_factory=list)

    @property
    def layout(self) -> Layout:
        return Layout({"w": torch.zeros(2)}, clients=len(self.targets))

    def optimum(self) -> torch.Tensor:
        """Where the mean of the losses, all counting the same, is lowest."""
        a = torch.tensor([self.curvature.get(id, 1.0) for id in self.targets])
        return (a[:, None] * torch.tensor(list(self.targets.values()))).sum(0) / a.sum()

    def answer(self, job: Job, client: View) -> Any:
        """The gradient, or gradient steps on the loss and the terms."""
        self.jobs.append(job)
        id = client.member.id
        a, target = self.curvature.get(id, 1.0), torch.tensor(self.targets[id])
        start = {"w": job.tensors["w"]}
        if isinstance(job, Gradient):
            away = start["w"] - target
            return Gradients({"w": a * away}, float(a / 2 * away.square().sum()), client.member.examples)
        assert isinstance(job, Fit)
        assert list(job.tensors) == ["w"]
        w, steps = start["w"], self.steps if isinstance(self.steps, int) else self.steps[id]
        for _ in range(steps):
            w = w.detach().requires_grad_()
            loss = a / 2 * (w - target).square().sum()
            for term in job.terms:
                loss = loss + term({"w": w}, start)
            (slope,) = torch.autograd.grad(loss, [w])
            w = w - self.rate * slope
        return Fitted({"w": w.detach()}, steps, steps, 0.0, self.rate)

    def ask(self, method: Method, state: Any, id: str, round: int = 1) -> Update:
        """The upload of one client, which keeps what it is told to."""
        member = Member(id, self.examples.get(id, 1))
        view = View(member, round, self.private.get(id, {}), self.layout)
        update = work(method, "local", view, method.message(state, member), self.answer)
        if view.kept is not None:
            self.private[id] = view.kept
        return update

    def run(
        self,
        method: Method,
        rounds: int,
        *,
        cohort: Callable[[int], Sequence[str]] | None = None,
        start: Sequence[float] = (0.0, 0.0),
        rule: Any = None,
    ) -> Any:
        """The state after so many rounds from the beginning, when no client keeps anything.

        Args:
            method: the federated method.
            rounds: how many.
            cohort: who takes part in a round, from 1; everybody unless given.
            start: the first weights.
            rule: the server rule, unless the method brings one.
        """
        self.private = {}
        state: Any = method.start(Layout({"w": torch.tensor(start)}, clients=len(self.targets)))
        rule = method.parts().get("rule") or rule or Add()
        for round in range(1, rounds + 1):
            updates = [self.ask(method, state, id, round) for id in (cohort(round) if cohort else self.targets)]
            state = method.apply(state, method.combine(state, updates, WeightedMean()), rule)
        return state


def apart() -> Quadratics:
    """Two clients of unlike curvature and optimum with several local steps, so that FedAvg misses the optimum."""
    return Quadratics({"a": (1.0, 0.0), "b": (-1.0, 1.0)}, {"a": 4.0, "b": 1.0}, steps=5)
