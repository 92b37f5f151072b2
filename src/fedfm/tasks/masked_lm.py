"""Masked language modelling on plain text: Devlin et al. 2019, BERT: Pre-training of Deep Bidirectional Transformers
for Language Understanding (arXiv 1810.04805).

Some tokens are hidden and predicted from both sides.

Differences from the paper:
- Which tokens are hidden is drawn once per text, from a seed that is a function of its tokens: the same text is masked
  alike by every client, in every epoch and in validation, so that no figure depends on who asks. The paper's data has
  ten copies of each text with different masks, RoBERTa draws anew in each step.
- There is no next-sentence prediction.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F

from fedfm.core import seeds
from fedfm.core.update import Tensors
from fedfm.errors import ModelError, RecipeError
from fedfm.tasks.task import IGNORE, Batch, Example, Losses, Task, TaskModel

if TYPE_CHECKING:
    from fedfm.models import Loaded

HIDDEN, SWAPPED = 0.8, 0.1
"""Of the chosen tokens, the share that the mask token replaces and the share that a random token replaces; the rest
stays as it is."""


@dataclass(frozen=True)
class MaskedLM(Task):
    """Masked language modelling on the column ``text``.

    Of a text's $n$ tokens that are neither special nor the first, $\\max(1, \\text{round}(p n))$ are to be predicted.

    Args:
        max_length: tokens; the rest of a longer text is cut off.
        mlm_probability: $p$, the share of the tokens to predict, above 0 and at most 1.
    """

    id: ClassVar[str] = "masked-lm"
    head: ClassVar[str] = "masked_lm"
    columns: ClassVar[tuple[str, ...]] = ("text",)

    max_length: int = 256
    mlm_probability: float = 0.15

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise RecipeError(f"task.max_length must be at least 2 tokens, but is {self.max_length}.")
        if not 0 < self.mlm_probability <= 1:
            raise RecipeError(f"task.mlm_probability must be above 0 and at most 1, but is {self.mlm_probability}.")

    def encode(self, rows: Iterable[Mapping[str, Any]], loaded: Loaded) -> list[Example]:
        tokenizer = loaded.tokenizer
        if tokenizer.mask_token_id is None:
            raise ModelError(f"the tokenizer of {loaded.name} has no mask token; use a model trained with one.")
        special = torch.tensor(tokenizer.all_special_ids)
        # A blank text has no token, and an empty list would become a tensor of floats.
        texts = (tokenizer(row["text"], truncation=True, max_length=self.max_length)["input_ids"] for row in rows)
        examples = (self._masked(torch.tensor(ids, dtype=torch.long), special, tokenizer) for ids in texts)
        return [example for example in examples if example is not None]

    def _masked(self, ids: torch.Tensor, special: torch.Tensor, tokenizer: Any) -> Example | None:
        """The example of a text ``[T]``; ``None`` when it has no token that may be hidden."""
        # The first position is never hidden, also where no special token stands there.
        free = 1 + (~torch.isin(ids[1:], special)).nonzero()[:, 0]  # [n]
        if not len(free):
            return None
        draw = seeds.generator(0, "masked-lm", *ids.tolist())
        count = max(1, round(self.mlm_probability * len(free)))
        chosen = free[torch.randperm(len(free), generator=draw)[:count]]
        fate = torch.rand(count, generator=draw)
        random = torch.randint(len(tokenizer), (count,), generator=draw)
        seen = torch.where(fate < HIDDEN, tokenizer.mask_token_id, ids[chosen])
        seen = torch.where((fate >= HIDDEN) & (fate < HIDDEN + SWAPPED), random, seen)
        target = torch.full_like(ids, IGNORE)
        target[chosen] = ids[chosen]
        return Example(ids.index_put((chosen,), seen), target)

    def losses(self, model: TaskModel, batch: Batch) -> Losses:
        """Loss of example i: $-\\sum_{t \\in M_i} \\log p(x_t | \\tilde x)$ over its chosen positions $M_i$, where
        $\\tilde x$ is the text as the model sees it."""
        logits = model.model(input_ids=batch.input_ids, attention_mask=batch.mask).logits  # [B, T, V]
        keep = batch.target != IGNORE  # [B, T]
        nats = F.cross_entropy(logits[keep].float(), batch.target[keep], reduction="none")  # [S]
        total = nats.new_zeros(len(keep)).index_add(0, keep.nonzero()[:, 0], nats)
        count = keep.sum(1)
        tally = {
            "loss": total.detach().double().sum(),
            "tokens": count.sum().double(),
            "examples": count.new_tensor(len(keep)).double(),
        }
        return Losses(total, count, tally)

    def metrics(self, tally: Tensors) -> dict[str, float]:
        """``loss`` in nats per hidden token and ``perplexity``, its exponential."""
        loss = float(tally["loss"] / tally["tokens"])
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}

    def prompt(self, row: Mapping[str, Any]) -> str:
        return row["text"]
