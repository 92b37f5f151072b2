"""Hidden units of feed-forward layers: where they are, and which of one network is which of another.

A feed-forward layer computes the same whatever the order of its hidden units, so networks trained apart may hold the
same units in different orders. Matching puts them in one order before anything is averaged.

Letters in shapes: C clients, H hidden units, D width, F numbers that describe a unit (its incoming weights and biases).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment

from fedfm.core import trees
from fedfm.core.update import Tensors

LAYERS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("intermediate.dense",), "output.dense"),  # BERT and its relatives
    (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),  # Llama and its relatives
    (("ffn.lin1",), "ffn.lin2"),  # DistilBERT
)
"""Feed-forward layers by the names of their linear layers: those into the hidden units, and the one out of them."""


@dataclass(frozen=True)
class Block:
    """A block of a transformer, by the names of its tensors.

    Args:
        stem: what the names of all its tensors begin with, up to its number.
        rows: tensors whose first dimension is the hidden units: ``[H, D]`` and ``[H]``.
        columns: the tensor whose second dimension is the hidden units, ``[D, H]``.
    """

    stem: str
    rows: tuple[str, ...]
    columns: str

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that matching permutes."""
        return (*self.rows, self.columns)

    def units(self, tensors: Tensors) -> torch.Tensor:
        """Each hidden unit as one vector of its incoming weights and biases, ``[H, F]``, in float64."""
        return torch.cat(
            [
                tensors[name].double().flatten(1) if tensors[name].dim() > 1 else tensors[name].double()[:, None]
                for name in self.rows
            ],
            dim=1,
        )

    def permuted(self, tensors: Tensors, order: torch.Tensor) -> dict[str, torch.Tensor]:
        """The layer's tensors with its hidden units in another order, which changes nothing in what it computes.

        Args:
            tensors: the layer's tensors, at least.
            order: which unit comes first, second, ...; ``[H]``.
        """
        return {**{n: tensors[n][order] for n in self.rows}, self.columns: tensors[self.columns][:, order]}


def blocks(names: Iterable[str]) -> list[Block]:
    """The blocks whose feed-forward layer is known by its names, from the lowest to the highest.

    >>> [b.stem for b in blocks(["h.layer.0.intermediate.dense.weight", "h.layer.0.output.dense.weight"])]
    ['h.layer.0']
    """
    present = set(names)
    found = []
    for into, out in LAYERS:
        for name in present:
            hit = re.fullmatch(rf"(.*\.\d+)\.{re.escape(into[0])}\.weight", name)
            columns = f"{hit[1]}.{out}.weight" if hit else ""
            if hit and columns in present:
                rows = (f"{hit[1]}.{layer}.{kind}" for layer in into for kind in ("weight", "bias"))
                found.append(Block(hit[1], tuple(row for row in rows if row in present), columns))
    return sorted(found, key=lambda block: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", block.stem)])


def match(units: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The order of ``units`` nearest to ``reference``, found by the Hungarian algorithm:
    $\\min_\\pi \\sum_i \\lVert u_{\\pi(i)} - r_i \\rVert^2$.

    >>> match(torch.tensor([[5.0], [1.0]]), torch.tensor([[0.0], [4.0]])).tolist()
    [1, 0]

    Args:
        units: ``[H, F]``.
        reference: ``[H, F]``.

    Returns:
        $\\pi$, ``[H]``: each of 0 to H-1 once.
    """
    # The squares of the vectors themselves add up to the same for every order; only the products decide.
    _, order = linear_sum_assignment((reference @ units.T).cpu().numpy(), maximize=True)
    return torch.from_numpy(order).to(units.device)


def orders(units: Sequence[torch.Tensor], weights: Sequence[float], sweeps: int) -> list[torch.Tensor]:
    """An order of the units of each client in which they meet those of the others.

    The first client keeps its order; each further one is matched to the weighted mean of those before it. Then, in each
    sweep, every client but the first is matched anew to the weighted mean of all others.

    Args:
        units: of each client, ``[H, F]``.
        weights: $p_k$, above 0, up to a factor.
        sweeps: how often all clients are matched anew.
    """
    found = [torch.arange(len(units[0]), device=units[0].device)]
    total, weight = units[0] * weights[0], weights[0]
    for own, share in zip(units[1:], weights[1:], strict=True):
        found.append(match(own, total / weight))
        total, weight = total + share * own[found[-1]], weight + share
    for _ in range(sweeps):
        for k in range(1, len(units)):
            others = total - weights[k] * units[k][found[k]]
            found[k] = match(units[k], others / (weight - weights[k]))
            total = others + weights[k] * units[k][found[k]]
    return found


def matched_mean(
    block: Block, clients: Sequence[Tensors], weights: Sequence[float], sweeps: int
) -> dict[str, torch.Tensor]:
    """The weighted mean of the clients' feed-forward layers after matching: $\\sum_k p_k \\pi_k(w_k)$.

    Args:
        block: which one.
        clients: their tensors, at least those of the layer.
        weights: $p_k$, up to a factor.
        sweeps: how often all clients are matched anew.
    """
    # The client of most weight lays down the order, whoever comes first.
    by_weight = sorted(range(len(clients)), key=lambda k: -weights[k])
    ordered, shares = [clients[k] for k in by_weight], [weights[k] / sum(weights) for k in by_weight]
    found = orders([block.units(tensors) for tensors in ordered], shares, sweeps)
    inputs = zip(ordered, shares, found, strict=True)
    summed = trees.total(
        {n: p * t.double() for n, t in block.permuted(tensors, order).items()} for tensors, p, order in inputs
    )
    return {name: tensor.to(clients[0][name].dtype) for name, tensor in summed.items()}
