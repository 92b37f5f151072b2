"""FedYogi: Reddi et al. 2021, Adaptive Federated Optimization (arXiv 2003.00295).

FedAvg whose mean change is taken for a gradient by Yogi on the server, whose second moment moves by bounded steps.

Differences from the paper:
- The local optimizer is whatever the training arguments say; ``optim: sgd`` gives the paper's.
- The mean is weighted by examples, as in the paper's experiments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fedfm.core.method import Method, Paper
from fedfm.rules import Yogi


@dataclass(frozen=True)
class FedYogi(Method):
    """$w \\leftarrow w + \\eta m / (\\sqrt v + \\tau)$ with
    $v \\leftarrow v - (1 - \\beta_2) \\Delta^2 sign(v - \\Delta^2)$.

    Args:
        learning_rate: $\\eta$, the server's; the paper tunes it over powers of ten to one half.
        beta1: $\\beta_1$, decay of the first moment.
        beta2: $\\beta_2$, decay of the second moment.
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
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def parts(self) -> Mapping[str, Any]:
        """Its server rule."""
        return {"rule": Yogi(learning_rate=self.learning_rate, beta1=self.beta1, beta2=self.beta2, tau=self.tau)}
