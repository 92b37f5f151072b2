"""FedMA: Wang et al. 2020, Federated Learning with Matched Averaging (arXiv 2002.06440).

Hidden units have no order, so before a layer is averaged, each client's units are matched to the others' by the
Hungarian algorithm. This goes layer by layer: a matched layer is frozen and the clients retrain the layers above.

Here a layer is the feed-forward layer of a transformer block: round l matches that of block l, and freezes the block.
After the blocks, one round trains and averages what is left; then a new pass begins, as in the paper's FedMA with
communication. A pass of a model of L blocks takes L + 1 rounds.

Differences from the paper:
- The number of units is fixed, because the shapes of a model are fixed by its architecture. The paper's BBP-MAP may
  open a new global unit where that costs less than a match; without it, its matching is the assignment solved here.
- A unit's cost is the squared distance of its incoming weights and biases. The paper's is this distance scaled by prior
  variances, plus a term for units that many clients have; with equal numbers of units, all are had by all.
- Everything but feed-forward layers is averaged without matching: the paper has no attention. The order of the residual
  stream's coordinates is kept, as norms and embeddings tie all blocks to it, so no block's inputs have to be permuted.
- Blocks above the one that is matched are averaged in each round, and all clients go on from the mean. The paper's
  clients keep their own until these are matched; then there is no global model before a pass ends, and no newcomer.
- A frozen block travels as zeros, so that all rounds' uploads have the same names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from fedfm.core import trees
from fedfm.core.jobs import Fit
from fedfm.core.method import Client, Mean, Method, Paper, Server, State, Work
from fedfm.core.space import Layout
from fedfm.core.traits import Trait, Traits
from fedfm.core.update import Tensors, Update
from fedfm.errors import RecipeError, require
from fedfm.methods.merge.matching import Block, blocks, matched_mean


@dataclass(frozen=True)
class Pass(State):
    """The state with the place in the pass.

    Args:
        round: number of the round under way, from 1.
    """

    round: int = 1


@dataclass(frozen=True)
class FedMA(Method):
    """$W_l \\leftarrow \\sum_k p_k \\Pi_k W_{k,l}$ and $W'_l \\leftarrow \\sum_k p_k W'_{k,l} \\Pi_k^\\top$ for the
    matrices into and out of the hidden units of block l, with permutations $\\Pi_k$ that minimise
    $\\sum_k p_k \\lVert \\Pi_k W_{k,l} - W_l \\rVert^2$; FedAvg for all other tensors.

    Args:
        sweeps: how often, after a first time, each client is matched anew to the mean of the others; ours.
    """

    paper: ClassVar[Paper | None] = Paper(
        title="Federated Learning with Matched Averaging",
        authors="Wang, Yurochkin, Sun, Papailiopoulos, Khazaeni",
        year=2020,
        venue="ICLR",
        arxiv="2002.06440",
    )
    traits: ClassVar[Traits] = Method.traits - {Trait.LINEAR}
    needs: ClassVar[Traits] = frozenset({Trait.VISIBLE})
    spaces: ClassVar[tuple[str, ...]] = ("full",)

    sweeps: int = 3

    def __post_init__(self) -> None:
        require(self, "sweeps", self.sweeps >= 0, "at least 0")

    def start(self, space: Layout) -> State:
        """The beginning of a pass."""
        weights = super().start(space).weights
        if not blocks(weights):
            raise RecipeError("FedMA knows the feed-forward layers of BERT, DistilBERT and Llama; this model has none.")
        return Pass(weights)

    def local(self, client: Client, message: Tensors) -> Work:
        """Train what is not frozen yet."""
        known = blocks(message)
        outside = trees.without(message, tuple(f"{block.stem}.*" for block in known))
        free = (*outside, *(f"{block.stem}.*" for block in known[_turn(known, client.round) :]))
        fitted = yield Fit(self.compose(client, message), train=free, terms=self.terms(client, message))
        after = {name: fitted.tensors[name] for name in message}
        return Update(trees.subtract(after, message), weight=client.member.examples, metrics=fitted.metrics)

    def combine(self, state: State, updates: Iterable[Update], mean: Mean) -> Update:
        """The mean of the changes, but of the matched block the change to the matched mean."""
        assert isinstance(state, Pass)
        known = blocks(state.weights)
        turn = _turn(known, state.round)
        matched = known[turn : turn + 1]  # none when the pass ends
        layer = {n: state.weights[n] for block in matched for n in block.names}
        kept: list[tuple[Tensors, float]] = []

        def passing() -> Iterator[Update]:
            for update in updates:
                kept.append(({n: t + update.tensors[n] for n, t in layer.items()}, update.weight))
                yield update

        combined = mean(passing())
        for block in matched:
            tensors, weights = zip(*kept, strict=True)
            change = trees.subtract(matched_mean(block, tensors, weights, self.sweeps), layer)
            combined = replace(combined, tensors={**combined.tensors, **change})
        return combined

    def round(self, server: Server, state: State) -> State:
        """A usual round; which block it matches follows from its number, which the clients know too."""
        assert isinstance(state, Pass)
        return super().round(server, replace(state, round=server.round))


def _turn(known: list[Block], round: int) -> int:
    """Index of the block that a round matches; their number when it averages what lies outside them."""
    return (round - 1) % (len(known) + 1)
