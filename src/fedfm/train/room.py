"""How much memory clients that train together may take, and how many tokens that is.

The bounds depend on the model and the kind of machine alone and not on what is free at the moment, so that a resumed
run forms the same groups.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

BESIDE = 384 << 20
"""Bytes that are spent beside a small model: half of what a process takes that has loaded torch and transformers."""

ENOUGH = 1024
"""Tokens that fill a processor's caches and cores: products of more rows run no faster."""


def budget(model: nn.Module) -> int:
    """Bytes for what clients that train together need beside the model.

    On a processor as much as the model itself takes, and some; on a GPU, which nobody else
    uses, half of what the model leaves.
    """
    weights = sum(p.nbytes for p in model.parameters())
    device = next(model.parameters()).device
    if device.type == "cuda":
        return max(BESIDE, (torch.cuda.get_device_properties(device).total_memory - weights) // 2)
    return BESIDE + weights


def affordable(model: nn.Module) -> int:
    """Tokens of a forward that trains whose activations take the :func:`budget`.

    Of each token, a block keeps about 8 vectors of its width D and 2 of the width of its feed-forward layer. More than
    ``ENOUGH`` make no forward of a processor faster.
    """
    config: Any = model.config
    text = config.get_text_config()
    width = getattr(text, "hidden_size", None) or getattr(text, "n_embd", None) or 768
    wide = getattr(text, "intermediate_size", None) or 4 * width
    layers = getattr(text, "num_hidden_layers", None) or 12
    tokens = max(1, int(budget(model) // (layers * (8 * width + 2 * wide) * 4)))
    return tokens if next(model.parameters()).device.type == "cuda" else min(tokens, ENOUGH)
