"""FedSA-LoRA: Guo et al. 2025, Selective Aggregation for Low-Rank Adaptation in Federated Learning (arXiv 2410.01463).

A learns what clients have in common, B what is a client's own: both are trained, A alone is averaged.

Differences from the paper:
- A new classification head, where the model has one, stays with the client, like B.
- The same rule on rsLoRA is this method on a space with ``use_rslora``; on VeRA it needs a space that is not offered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedfm.core.method import Method, Paper, State
from fedfm.core.space import Layout
from fedfm.core.traits import Trait, Traits
from fedfm.core.trees import Patterns
from fedfm.core.update import Tensors


@dataclass(frozen=True)
class FedSALoRA(Method):
    """$A \\leftarrow \\sum_k p_k A_k$; $B_k$ stays with client $k$."""

    paper: ClassVar[Paper | None] = Paper(
        title="Selective Aggregation for Low-Rank Adaptation in Federated Learning",
        authors="Guo, Zeng, Wang, Liang, Zhang, Qu",
        year=2025,
        venue="ICLR",
        arxiv="2410.01463",
    )
    share: ClassVar[Patterns] = ("lora_A",)
    traits: ClassVar[Traits] = Method.traits - {Trait.FORGETFUL, Trait.GLOBAL}
    spaces: ClassVar[tuple[str, ...]] = ("lora",)

    def result(self, state: State, space: Layout) -> Tensors:
        """There is no global model: with A alone, nothing is added."""
        return {}
