"""FedIT: Zhang et al. 2024, Towards Building the FederatedGPT: Federated Instruction Tuning (arXiv 2305.05644).

FedAvg on LoRA factors: instruction tuning of a language model in which only the factors A and B travel.

Averaging A and B apart from each other is not averaging their products B A; the paper accepts this, and later methods
remove it.

Differences from the paper:
- Dialogues are rendered by the tokenizer's own chat template instead of the Alpaca template of the paper's code, and
  the loss covers the answers alone; the paper's code has a switch for this.
- Rank, targets and learning rate are settings of the space and of training, for any model; the paper's are r = 8 to
  16, alpha = 16, dropout 0.05, the attention projections of LLaMA-7B, AdamW at 3e-4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedfm.core.method import Method, Paper


@dataclass(frozen=True)
class FedIT(Method):
    """$A \\leftarrow \\sum_k p_k A_k$ and $B \\leftarrow \\sum_k p_k B_k$ with $p_k = n_k / n$."""

    paper: ClassVar[Paper | None] = Paper(
        title="Towards Building the FederatedGPT: Federated Instruction Tuning",
        authors="Zhang, Vahidian, Kuo, Li, Zhang, Yu, Wang, Chen",
        year=2024,
        venue="ICASSP",
        arxiv="2305.05644",
    )
    spaces: ClassVar[tuple[str, ...]] = ("lora",)
