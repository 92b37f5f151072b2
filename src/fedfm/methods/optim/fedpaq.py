"""FedPAQ: Reisizadeh et al. 2020, FedPAQ: A Communication-Efficient Federated Learning Method with Periodic Averaging
and Quantization (arXiv 1909.13014).

Some clients take several local steps and send the quantised difference to the weights that they received; the server
adds the mean of what they sent.

Differences from the paper:
- The quantiser works on each tensor by itself, with a norm each, not on one vector of all weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from fedfm.core.method import Client, Method, Paper, Work
from fedfm.core.update import Tensors
from fedfm.wire.qsgd import QSGD


@dataclass(frozen=True)
class FedPAQ(Method):
    """$w \\leftarrow w + \\frac{1}{r} \\sum_k Q(w_k - w)$ over the $r$ clients of the round.

    Args:
        levels: $s$, levels of the quantiser; the paper tries 1, 5 and 10.
    """

    paper: ClassVar[Paper | None] = Paper(
        title="FedPAQ: A Communication-Efficient Federated Learning Method with Periodic Averaging and Quantization",
        authors="Reisizadeh, Mokhtari, Hassani, Jadbabaie, Pedarsani",
        year=2020,
        venue="AISTATS",
        arxiv="1909.13014",
    )

    levels: int = 10

    def parts(self) -> Mapping[str, Any]:
        """Its quantiser."""
        return {"stages": (QSGD(levels=self.levels),)}

    def local(self, client: Client, message: Tensors) -> Work:
        """The default client work; all clients count the same."""
        update = yield from super().local(client, message)
        return replace(update, weight=1.0)
