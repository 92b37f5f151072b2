"""FedAdagrad: Reddi et al. 2021, Adaptive Federated Optimization (arXiv 2003.00295).

FedAvg whose mean change is taken for a gradient by Adagrad on the server: coordinates that change in few rounds take
larger steps.

Differences from the paper:
- The local optimizer is whatever the training arguments say; ``optim: sgd`` gives the paper's.
- The mean is weighted by examples, as in the paper's experiments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fedfm.core.method import Method, Paper
from fedfm.rules import Adagrad


@dataclass(frozen=True)
class FedAdagrad(Method):
    """$w \\leftarrow w + \\eta m / (\\sqrt v + \\tau)$ with $v$ the sum of $\\Delta^2$ over rounds.

    Args:
        learning_rate: $\\eta$, the server's; the paper tunes it over powers of ten to one half.
        beta1: $\\beta_1$, decay of the first moment.
        tau: $\\tau$, degree of adaptivity.
    """

    paper: ClassVar[Paper | None] = Paper(
        title="Adaptive Federated Optimization",
        authors="Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar, McMahan",
        year=2021,
        venue="ICLR",
        arxiv="2003.00295",
    )

    learning_rate: float = 0.1
    beta1: float = 0.0
    tau: float = 1e-3

    def parts(self) -> Mapping[str, Any]:
        """Its server rule."""
        return {"rule": Adagrad(learning_rate=self.learning_rate, beta1=self.beta1, tau=self.tau)}
