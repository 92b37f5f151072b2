"""What the adaptive server rules share: Reddi et al. 2021, Adaptive Federated Optimization, ICLR 2021
(arXiv 2003.00295), Algorithm 2.

With $\\Delta$ the mean of the clients' changes, $m$ starting at 0 and $v$ at $\\tau^2$:

$$m \\leftarrow \\beta_1 m + (1 - \\beta_1) \\Delta, \\quad v \\leftarrow \\text{as the rule says}, \\quad
w \\leftarrow w + \\eta \\, m / (\\sqrt{v} + \\tau)$$

There is no correction of bias, unlike in Kingma and Ba's Adam. Moments are kept in float32 or wider.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fedfm.core import trees
from fedfm.core.traits import Part, Trait, Traits
from fedfm.core.update import Tensors
from fedfm.errors import RecipeError


@dataclass(frozen=True)
class Adaptive(Part, ABC):
    """Base of the adaptive rules.

    Args:
        learning_rate: $\\eta$; a coordinate on which rounds agree moves by up to about $\\eta$ a round.
        beta1: $\\beta_1$, at least 0 and below 1.
        tau: $\\tau$, degree of adaptivity: the smaller, the more the steps of the coordinates are evened out.
    """

    needs: ClassVar[Traits] = frozenset({Trait.RULED})

    learning_rate: float = 0.1
    beta1: float = 0.9
    tau: float = 1e-3

    def __post_init__(self) -> None:
        above_zero("learning_rate", self.learning_rate)
        above_zero("tau", self.tau)
        decay("beta1", self.beta1)

    @abstractmethod
    def second(self, v: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        """The new $v$, given the old and $\\Delta^2$, all of one shape."""

    def __call__(
        self, weights: Tensors, delta: Tensors, memory: Mapping[str, Any]
    ) -> tuple[Tensors, Mapping[str, Any]]:
        """The new weights, and a memory with the trees ``m`` and ``v``; names that did not travel stay as they are."""
        first, second = dict(memory.get("m", {})), dict(memory.get("v", {}))
        step = {}
        for name, change in delta.items():
            d = trees.wide(change)
            m = first[name] if name in first else torch.zeros_like(d)
            v = second[name] if name in second else torch.full_like(d, self.tau**2)
            first[name] = self.beta1 * m + (1 - self.beta1) * d
            second[name] = self.second(v, d.square())
            step[name] = first[name] / (second[name].sqrt() + self.tau)
        return trees.add(weights, step, self.learning_rate), {**memory, "m": first, "v": second}


def above_zero(name: str, value: float) -> None:
    """Raise ``RecipeError`` unless the setting ``value`` of a rule is above 0 and finite."""
    if not 0 < value < float("inf"):
        raise RecipeError(f"rule.{name} must be above 0 and finite, but is {value}.")


def decay(name: str, value: float) -> None:
    """Raise ``RecipeError`` unless the setting ``value`` of a rule is at least 0 and below 1."""
    if not 0 <= value < 1:
        raise RecipeError(f"rule.{name} must be at least 0 and below 1, but is {value}.")
