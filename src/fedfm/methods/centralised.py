"""Centralised training, the upper reference of the surveys: all clients' data in one place.

One client holds the union of the clients' training splits and takes, in each round, as many steps as all participants
of the federated run of the same plan take together, at the same batch size and learning rate. The optimizer is fresh in
each round, as there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from fedfm.core.method import Method, Paper
from fedfm.core.plan import Plan
from fedfm.sample.uniform import Uniform


@dataclass(frozen=True)
class Centralised(Method):
    """$w$ is trained on $\\bigcup_k D_k$."""

    paper: ClassVar[Paper | None] = Paper(
        title="Centralised training (reference)", authors="", year=2017, venue="baseline"
    )
    simulated_only: ClassVar[bool] = True

    def plan(self, plan: Plan) -> Plan:
        """Pool the data; multiply the work of a round by the number of participants."""
        clients = len(plan.members.ids)
        cohort = plan.sampler.expected(clients)
        training = plan.training
        if training.max_steps > 0:
            training = replace(training, max_steps=max(1, round(training.max_steps * cohort)))
        else:
            training = replace(training, num_train_epochs=training.num_train_epochs * cohort / clients)
        return replace(plan, members=plan.members.pooled(), sampler=Uniform(), training=training)
