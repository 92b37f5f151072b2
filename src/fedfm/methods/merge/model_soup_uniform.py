"""Model soup, uniform: Wortsman et al. 2022, Model soups: averaging weights of multiple fine-tuned models improves
accuracy without increasing inference time (arXiv 2203.05482).

Every client fine-tunes the same pre-trained model once, each with its own hyper-parameters; the mean of the weights is
the model. One exchange in all.

Differences from the paper:
- The paper's ingredients see the same data and differ in their hyper-parameters; a federation's see different data,
  too.
- Of the hyper-parameters only the learning rate is drawn. The paper's random search for CLIP also varies epochs,
  weight decay, label smoothing and augmentation, and draws the learning rate over two decades; half a decade to either
  side of the run's is ours, so that no client of a small federation is lost.
- In its one round a client takes as many steps as in all rounds of a federated run of the same plan, so the two differ
  in how often they exchange and not in how long they train.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedfm.core import trees
from fedfm.core.jobs import Fit
from fedfm.core.method import Client, Method, Paper, Work
from fedfm.core.plan import Plan
from fedfm.core.update import Tensors, Update
from fedfm.errors import RecipeError
from fedfm.sample.uniform import Uniform

SOUPS = Paper(
    title="Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing "
    "inference time",
    authors="Wortsman, Ilharco, Gadre, Roelofs, Gontijo-Lopes, Morcos, Namkoong, Farhadi, Carmon, Kornblith, Schmidt",
    year=2022,
    venue="ICML",
    arxiv="2203.05482",
)


def everyone(plan: Plan, rounds: int) -> Plan:
    """The plan with all clients in each of so many rounds, in which they do the local work of all its rounds."""
    clients = len(plan.members.ids)
    share = plan.rounds / rounds * plan.sampler.expected(clients) / clients
    training = plan.training
    if training.max_steps > 0:
        training = replace(training, max_steps=max(1, round(training.max_steps * share)))
    else:
        training = replace(training, num_train_epochs=training.num_train_epochs * share)
    return replace(plan, rounds=rounds, sampler=Uniform(), training=training)


def between(rates: tuple[float, float]) -> None:
    """Raise ``RecipeError`` unless ``rates`` can be drawn from."""
    low, high = rates
    if not 0 < low <= high < math.inf:
        raise RecipeError(f"rates must be two finite numbers above 0, the smaller one first, but are {low} and {high}.")


def fine_tune(method: Method, client: Client, message: Tensors, rates: tuple[float, float]) -> Work:
    """Client work: train at a learning rate of the client's own."""
    low, high = rates
    at = torch.rand((), generator=client.draw("learning rate"), dtype=torch.float64).item()
    factor = low * (high / low) ** at
    fitted = yield Fit(
        method.compose(client, message), train=method.train, terms=method.terms(client, message), rate=factor
    )
    numbers = {**fitted.metrics, "learning_rate": fitted.learning_rate}
    after = {name: fitted.tensors[name] for name in message}
    return Update(trees.subtract(after, message), weight=client.member.examples, metrics=numbers)


@dataclass(frozen=True)
class ModelSoupUniform(Method):
    """$w = \\frac{1}{N} \\sum_k w_k$, once, over all clients.

    Args:
        rates: a client's learning rate is the run's times a factor drawn log-uniformly between these two.
    """

    paper: ClassVar[Paper | None] = SOUPS

    rates: tuple[float, float] = (0.3, 3.0)

    def __post_init__(self) -> None:
        between(self.rates)

    def plan(self, plan: Plan) -> Plan:
        """One round with everyone."""
        return everyone(plan, 1)

    def local(self, client: Client, message: Tensors) -> Work:
        """Fine-tune at this client's learning rate; all count equally."""
        update = yield from fine_tune(self, client, message, self.rates)
        return replace(update, weight=1.0)
