"""pFedPG: Yang et al. 2023, Efficient Model Personalization in Federated Learning via Client-Specific Prompt Generation
(arXiv 2308.15367).

The server makes a prompt for each client out of common base prompts and a descriptor of that client. The client trains
it together with a head of its own and returns its change, which the server carries back through the generator: it is
taken for a descent direction at the generator's output. No client's tensors are averaged.

Differences from the paper:
- Classes of text with the prompt among the token embeddings, instead of images with prompts among the patches.
- Queries come from the descriptor, keys and values from the base prompts, and a descriptor has as many rows as the
  prompt. Descriptions of the method differ in this; were one row the only key, the softmax would be constant.
- Base prompts start as the space's prompt. Descriptors start from the standard normal distribution, a client's as a
  function of the run's seed and its id, so it is made when the client first takes part.
- The server's learning rate is ours. Another server rule than plain addition, which is SGD, applies to all that the
  server trains.
- There is no global model: heads are personal, so a prompt alone classifies nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from fedfm.core import seeds, trees
from fedfm.core.method import Mean, Method, Paper, Rule, State
from fedfm.core.space import Layout
from fedfm.core.traits import Trait, Traits
from fedfm.core.update import Member, Tensors, Update
from fedfm.errors import RecipeError
from fedfm.spaces.prompt import NAME

CLIENT = "client:"
"""Before the id of a client, the name of its descriptor."""


@dataclass(frozen=True)
class GeneratorState(State):
    """``weights`` holds the generator: ``base`` ``[L, D]``, and ``query``, ``key``, ``value`` and ``out`` ``[D, D]``.

    Args:
        descriptors: $d_k$ ``[L, D]`` of the clients that took part so far.
        seed: of the run; the other descriptors follow from it.
    """

    descriptors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    seed: int = 0

    def descriptor(self, client: str) -> torch.Tensor:
        """$d_k$ ``[L, D]``."""
        if CLIENT + client in self.descriptors:
            return self.descriptors[CLIENT + client]
        draw = seeds.generator(self.seed, "method", "descriptor", client)
        return torch.randn(self.weights["base"].shape, generator=draw)


def generate(weights: Tensors, descriptor: torch.Tensor) -> torch.Tensor:
    """The prompt ``[L, D]`` of a client."""
    base = weights["base"]
    query, key, value = descriptor @ weights["query"], base @ weights["key"], base @ weights["value"]
    attention = torch.softmax(query @ key.T / key.shape[1] ** 0.5, dim=1)  # [L, L]
    return base + attention @ value @ weights["out"]


@dataclass(frozen=True)
class PFedPG(Method):
    """$P_k = G_\\theta(d_k) = P_{base} + softmax(d_k W_Q (P_{base} W_K)^T / \\sqrt{D}) P_{base} W_V W_O$.

    With $\\Delta P_k$ the change that client k returns, $\\theta \\leftarrow \\theta + \\eta \\sum_k (\\partial P_k /
    \\partial \\theta)^T \\Delta P_k$, and $d_k$ likewise; $\\theta$ includes $P_{base}$.

    Args:
        server_learning_rate: $\\eta$.
    """

    paper: ClassVar[Paper | None] = Paper(
        title="Efficient Model Personalization in Federated Learning via Client-Specific Prompt Generation",
        authors="Yang, Wang, Wang",
        year=2023,
        venue="ICCV",
        arxiv="2308.15367",
    )
    share: ClassVar[trees.Patterns] = (NAME,)
    traits: ClassVar[Traits] = Method.traits - {Trait.LINEAR, Trait.FORGETFUL, Trait.GLOBAL}
    needs: ClassVar[Traits] = frozenset({Trait.VISIBLE, Trait.ALIGNED})
    spaces: ClassVar[tuple[str, ...]] = ("prompt",)
    tasks: ClassVar[tuple[str, ...]] = ("classify",)

    server_learning_rate: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.server_learning_rate < float("inf"):
            raise RecipeError(
                f"PFedPG server_learning_rate must be above 0 and finite, but is {self.server_learning_rate}."
            )

    def start(self, space: Layout) -> GeneratorState:
        base = space.initial[NAME].float()
        width = base.shape[1]
        draw = seeds.generator(space.seed, "method", "generator")
        drawn = {n: torch.randn(width, width, generator=draw) / width**0.5 for n in ("query", "key", "value", "out")}
        return GeneratorState({"base": base, **drawn}, seed=space.seed)

    def message(self, state: State, member: Member) -> Tensors:
        assert isinstance(state, GeneratorState)
        return {NAME: generate(state.weights, state.descriptor(member.id))}

    def result(self, state: State, space: Layout) -> Tensors:
        return {}

    def combine(self, state: State, updates: Iterable[Update], mean: Mean) -> Update:
        """The directions in which the generator and the descriptors move: what each change pulls them to, summed."""
        assert isinstance(state, GeneratorState)
        pulls: list[Tensors] = []
        for update in updates:
            pull = torch.func.vjp(generate, dict(state.weights), state.descriptor(update.member))[1]
            weights, descriptor = pull(update.tensors[NAME].float())
            pulls.append({**weights, CLIENT + update.member: descriptor})
        return Update(trees.total(pulls), weight=len(pulls), member="mean")

    def apply(self, state: State, combined: Update, rule: Rule) -> State:
        assert isinstance(state, GeneratorState)
        moving = [name for name in combined.tensors if name.startswith(CLIENT)]
        before = {**state.weights, **{name: state.descriptor(name.removeprefix(CLIENT)) for name in moving}}
        after, memory = rule(before, trees.scale(combined.tensors, self.server_learning_rate), state.memory)
        descriptors = {**state.descriptors, **{name: after[name] for name in moving}}
        return GeneratorState({name: after[name] for name in state.weights}, memory, descriptors, state.seed)
