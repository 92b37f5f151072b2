"""Plain addition, the server rule of FedAvg."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fedfm.core import trees
from fedfm.core.traits import Part
from fedfm.core.update import Tensors
from fedfm.errors import RecipeError


@dataclass(frozen=True)
class Add(Part):
    """$w \\leftarrow w + \\eta_g \\Delta$.

    Args:
        learning_rate: $\\eta_g$; 1 makes the new weights the mean of the clients' weights.
    """

    id: ClassVar[str] = "add"

    learning_rate: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < float("inf"):
            raise RecipeError(f"rule.learning_rate must be above 0 and finite, but is {self.learning_rate}.")

    def __call__(
        self, weights: Tensors, delta: Tensors, memory: Mapping[str, Any]
    ) -> tuple[Tensors, Mapping[str, Any]]:
        """The new weights; the memory stays as it was."""
        return trees.add(weights, delta, self.learning_rate), memory
