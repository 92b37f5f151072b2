"""FedAvg: McMahan et al. 2017, Communication-Efficient Learning of Deep Networks from Decentralized Data
(arXiv 1602.05629).

Clients train the shared weights on their own data for some steps; the server takes the mean of the results, weighted by
the number of examples.

Differences from the paper:
- A client sends the change of the weights, not the weights. The mean is the same up to rounding, and stages that clip,
  compress or add noise need the change.
- The local optimizer is whatever the training arguments say, AdamW by default, because foundation models are tuned with
  it; ``optim: sgd`` gives the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from fedfm.core.method import Client, Method, Paper, Work
from fedfm.core.update import Tensors


@dataclass(frozen=True)
class FedAvg(Method):
    """$w \\leftarrow w + \\sum_k p_k (w_k - w)$.

    Args:
        weighting: $p_k = n_k / n$ by ``examples`` as in the paper, or $1 / m$ by ``clients``, as some surveys print it.
    """

    paper: ClassVar[Paper | None] = Paper(
        title="Communication-Efficient Learning of Deep Networks from Decentralized Data",
        authors="McMahan, Moore, Ramage, Hampson, Agüera y Arcas",
        year=2017,
        venue="AISTATS",
        arxiv="1602.05629",
    )

    weighting: Literal["examples", "clients"] = "examples"

    def local(self, client: Client, message: Tensors) -> Work:
        """The default client work, with the chosen weight."""
        update = yield from super().local(client, message)
        return update if self.weighting == "examples" else replace(update, weight=1.0)
