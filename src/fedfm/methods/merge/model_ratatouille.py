"""Model ratatouille: Ramé et al. 2023, Model Ratatouille: Recycling Diverse Models for Out-of-Distribution
Generalization (arXiv 2212.10445).

Models fine-tuned on auxiliary tasks are the starting points of fine-tunings on the target task, whose weights are
averaged once. Starting points that differ make the ingredients of the soup more diverse than one alone would.

Differences from the paper:
- The auxiliary tasks are the clients' own data, fine-tuned on in a first round; each client then goes on from the model
  of another. The paper takes auxiliary models from elsewhere and fine-tunes each on all target data.
- The paper first trains a head alone, for all ingredients to start from; a language model has its head already, and a
  classifier's is left as the run drew it, the same for all.
- In each leg a client takes half of the steps of all rounds of a federated run of the same plan.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from fedfm.core import trees
from fedfm.core.method import Mean, Method, Paper, Server, State
from fedfm.core.plan import Plan
from fedfm.core.space import Layout
from fedfm.core.traits import Trait, Traits
from fedfm.core.update import Member, Tensors, Update
from fedfm.errors import NoUpdates
from fedfm.methods.merge.model_soup_uniform import everyone


@dataclass(frozen=True)
class Legs(State):
    """The state with the models of the first leg.

    Args:
        names: clients whose models there are, sorted; empty before the first leg and after the merge.
        auxiliary: their models, in that order.
    """

    names: tuple[str, ...] = ()
    auxiliary: tuple[Tensors, ...] = ()


@dataclass(frozen=True)
class ModelRatatouille(Method):
    """$w = \\frac{1}{N} \\sum_k w_k$, once, where client $k$ trained $w_k$ from what client $k + 1$ made of $w_0$."""

    paper: ClassVar[Paper | None] = Paper(
        title="Model Ratatouille: Recycling Diverse Models for Out-of-Distribution Generalization",
        authors="Ramé, Ahuja, Zhang, Cord, Bottou, Lopez-Paz",
        year=2023,
        venue="ICML",
        arxiv="2212.10445",
    )
    # The plan makes two questions of one exchange.
    traits: ClassVar[Traits] = Method.traits - {Trait.LINEAR, Trait.ONE_ASK}
    needs: ClassVar[Traits] = frozenset({Trait.VISIBLE})
    down: ClassVar[str] = "the initial model, then the model of another client"

    def plan(self, plan: Plan) -> Plan:
        """Two rounds with everyone: the legs."""
        return everyone(plan, 2)

    def start(self, space: Layout) -> State:
        """No models yet."""
        return Legs(super().start(space).weights)

    def message(self, state: State, member: Member) -> Tensors:
        """In the second leg, the model of the client that comes next by name."""
        return self._start(state, member.id)

    def combine(self, state: State, updates: Iterable[Update], mean: Mean) -> Update:
        """The uniform mean of the trained weights, as a change of the shared ones."""
        assert isinstance(state, Legs)
        return mean(self._moved(state, update) for update in updates)

    def round(self, server: Server, state: State) -> State:
        """The first time, keep every client's model; the second time, merge them and forget those."""
        assert isinstance(state, Legs)
        if state.names:
            merged = super().round(server, state)
            return Legs(merged.weights, merged.memory)
        messages = dict.fromkeys(server.members, state.weights)
        models = {u.member: trees.add(state.weights, u.tensors) for u in server.ask("local", messages)}
        if not models:
            raise NoUpdates("nobody's update could be used")
        names = tuple(sorted(models))
        return replace(state, names=names, auxiliary=tuple(models[name] for name in names))

    @staticmethod
    def _start(state: State, client: str) -> Tensors:
        assert isinstance(state, Legs)
        if not state.names:
            return state.weights
        return state.auxiliary[bisect_right(state.names, client) % len(state.names)]

    def _moved(self, state: Legs, update: Update) -> Update:
        """The upload as a change of the shared weights, of weight 1."""
        start = self._start(state, update.member)
        if start is state.weights:
            return replace(update, weight=1.0)
        moved = trees.add(trees.subtract(start, state.weights), update.tensors)
        return replace(update, tensors=moved, weight=1.0)
