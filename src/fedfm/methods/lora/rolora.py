"""RoLoRA: Chen et al. 2025, Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA
(arXiv 2502.01755).

A round trains and averages one factor, the next round the other. The factor at rest is the same on all clients, so the
mean of the products is the product of the mean in every round, as in FFA-LoRA; yet A is learnt, too.

Differences from the paper:
- A client receives both factors, not only the one averaged last: then it needs no memory, and clients that missed
  rounds can take part. What it sends is one factor, as in the paper.
- A new classification head, where the model has one, is trained and averaged in every round.
- A round in which nobody's upload could be used does not count: the same factor has its turn again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from fedfm.core import trees
from fedfm.core.jobs import Fit
from fedfm.core.method import Client, Method, Paper, Rule, State, Work
from fedfm.core.space import Layout
from fedfm.core.traits import Trait, Traits
from fedfm.core.update import Member, Tensors, Update
from fedfm.errors import require
from fedfm.methods.lora import product

FIXED = "fixed"
"""The mark of the factor at rest in a message."""


@dataclass(frozen=True)
class Turns(State):
    """State of RoLoRA.

    Args:
        turn: how many rounds are done.
    """

    turn: int = 0


@dataclass(frozen=True)
class RoLoRA(Method):
    """$B \\leftarrow \\sum_k p_k B_k$ with $A$ fixed in odd rounds, $A \\leftarrow \\sum_k p_k A_k$ with $B$ fixed in
    even ones, with $p_k = n_k / n$.

    Args:
        first: the factor of the first round, ``B`` or ``A``; as B begins at zero, A has no gradient before B moved.
    """

    paper: ClassVar[Paper | None] = Paper(
        title="Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA",
        authors="Chen, Guo, Ju, Dalal, Zhu, Khisti",
        year=2025,
        venue="NeurIPS",
        arxiv="2502.01755",
    )
    traits: ClassVar[Traits] = Method.traits - {Trait.STEADY}
    spaces: ClassVar[tuple[str, ...]] = ("lora",)
    up: ClassVar[str] = "B in odd rounds, A in even ones"
    down: ClassVar[str] = "both LoRA factors"

    first: Literal["B", "A"] = "B"

    def __post_init__(self) -> None:
        require(self, "first", self.first in ("B", "A"), "B or A")

    def start(self, space: Layout) -> State:
        """Nobody had a turn yet."""
        return Turns(trees.select(space.initial, self.share))

    def message(self, state: State, member: Member) -> Tensors:
        """Both factors, of which that at rest bears a mark."""
        assert isinstance(state, Turns)
        trains_b = (self.first == "B") == (state.turn % 2 == 0)
        fixed = (product.FACTORS[0 if trains_b else 1],)
        return {**trees.without(state.weights, fixed), **trees.mark(FIXED, trees.select(state.weights, fixed))}

    def compose(self, client: Client, message: Tensors) -> Tensors:
        """Both factors by their plain names."""
        return {**trees.marked("", message), **trees.marked(FIXED, message)}

    def local(self, client: Client, message: Tensors) -> Work:
        """Train and send what bears no mark."""
        moving = trees.marked("", message)
        fitted = yield Fit(self.compose(client, message), train=tuple(moving))
        change = trees.subtract({name: fitted.tensors[name] for name in moving}, moving)
        return Update(change, weight=client.member.examples, metrics=fitted.metrics)

    def expects(self, phase: str, message: Tensors) -> Tensors | None:
        """What bears no mark."""
        return trees.marked("", message)

    def apply(self, state: State, combined: Update, rule: Rule) -> State:
        """Move the factor that was trained; then it is the other's turn."""
        assert isinstance(state, Turns)
        weights, memory = rule(state.weights, combined.tensors, state.memory)
        return replace(state, weights=weights, memory=memory, turn=state.turn + 1)
