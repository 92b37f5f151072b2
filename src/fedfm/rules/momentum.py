"""Momentum on the server: Hsu et al. 2019, Measuring the Effects of Non-Identical Data Distribution for Federated
Visual Classification (arXiv 1909.06335), FedAvgM.

A decaying sum of the mean changes is applied instead of the last one, which evens out rounds with unlike clients.

Differences from the paper:
- The paper writes the change with the opposite sign and subtracts it; the weights are the same.
- Nesterov's variant, of which the paper speaks too, is a setting; off by default, as in the paper's formula.
- The paper tries $\\beta$ of 0, 0.7, 0.9, 0.97, 0.99 and 0.997; the default is 0.9.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fedfm.core import trees
from fedfm.core.traits import Part, Trait, Traits
from fedfm.core.update import Tensors
from fedfm.rules.adaptive import above_zero, decay


@dataclass(frozen=True)
class Momentum(Part):
    """$m \\leftarrow \\beta m + \\Delta$ and $w \\leftarrow w + \\eta m$; with Nesterov,
    $w \\leftarrow w + \\eta (\\Delta + \\beta m)$ with the new $m$.

    Args:
        learning_rate: $\\eta$.
        beta: $\\beta$, at least 0 and below 1; 0 is plain addition.
        nesterov: look one step ahead.
    """

    id: ClassVar[str] = "momentum"
    needs: ClassVar[Traits] = frozenset({Trait.RULED})

    learning_rate: float = 1.0
    beta: float = 0.9
    nesterov: bool = False

    def __post_init__(self) -> None:
        above_zero("learning_rate", self.learning_rate)
        decay("beta", self.beta)

    def __call__(
        self, weights: Tensors, delta: Tensors, memory: Mapping[str, Any]
    ) -> tuple[Tensors, Mapping[str, Any]]:
        """The new weights, and a memory with the tree ``m``; names that did not travel stay as they are."""
        old = memory.get("m", {})
        new = {n: trees.wide(d) + self.beta * old[n] if n in old else trees.wide(d).clone() for n, d in delta.items()}
        step = {n: trees.wide(d) + self.beta * new[n] for n, d in delta.items()} if self.nesterov else new
        return trees.add(weights, step, self.learning_rate), {**memory, "m": {**old, **new}}
