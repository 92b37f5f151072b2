"""FedAvgM: Hsu et al. 2019, Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification (arXiv 1909.06335).

FedAvg with momentum on the server: what rounds agree on adds up, what skewed cohorts disagree on cancels.

Differences from the paper:
- The local optimizer is whatever the training arguments say; ``optim: sgd`` gives the paper's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fedfm.core.method import Method, Paper
from fedfm.rules import Momentum


@dataclass(frozen=True)
class FedAvgM(Method):
    """$v \\leftarrow \\beta v + \\Delta$ and $w \\leftarrow w + \\eta v$.

    Args:
        learning_rate: $\\eta$, the server's.
        beta: $\\beta$, the paper's grid has 0.7, 0.9, 0.97, 0.99 and more.
        nesterov: $w \\leftarrow w + \\eta (\\Delta + \\beta v)$ instead.
    """

    paper: ClassVar[Paper | None] = Paper(
        title="Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification",
        authors="Hsu, Qi, Brown",
        year=2019,
        arxiv="1909.06335",
    )

    learning_rate: float = 1.0
    beta: float = 0.9
    nesterov: bool = False

    def parts(self) -> Mapping[str, Any]:
        """Its server rule."""
        return {"rule": Momentum(learning_rate=self.learning_rate, beta=self.beta, nesterov=self.nesterov)}
