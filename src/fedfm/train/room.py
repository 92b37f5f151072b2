"""How much memory clients that train together may take, and how many tokens that is.

The bounds depend on the model and the kind of machine alone and not on what is free at the moment, so that a resumed
run forms the same groups.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

BESIDE = 256 << 20
"""Bytes that are spent beside a small model: a process that has loaded torch and transformers takes twice as many."""


def budget(model: nn.Module) -> int:
    """Bytes for what clients that train together need beside the model.

    On a processor half of the model's own and some, so that memory grows by half at most; on a GPU, which nobody else
    uses, half of what the model leaves.
    """
    weights = sum(p.nbytes for p in model.parameters())
    device = next(model.parameters()).device
    if device.type == "cuda":
        return max(BESIDE, (torch.cuda.get_device_properties(device).total_memory - weights) // 2)
    return BESIDE + weights // 2


def affordable(model: nn.Module) -> int:
    """Tokens of a forward that trains whose activations take the :func:`budget`.

    Of each token, a block keeps about 12 vectors of its width D and 3 of the width of its feed-forward layer.
    """
    config: Any = model.config
    text = config.get_text_config()
    width = getattr(text, "hidden_size", None) or getattr(text, "n_embd", None) or 768
    wide = getattr(text, "intermediate_size", None) or 4 * width
    layers = getattr(text, "num_hidden_layers", None) or 12
    return max(1, int(budget(model) // (layers * (12 * width + 3 * wide) * 4)))
