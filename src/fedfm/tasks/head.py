"""The loss of a language-model head, a chunk of positions at a time.

A head over a vocabulary of 50,000 words makes 200 kB of logits for each position, and training needs them three times
over. Here the logits of a chunk are made, turned into losses and into the gradient of what entered the head, and gone
before the next chunk: the gradient of a position's loss does not depend on the loss of others, so it can be made in the
forward and only be scaled in the backward. As in Hsu et al. 2024, Liger Kernel (arXiv 2410.10989).

Letters in shapes: S positions, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

CHUNK = 128
"""Positions whose logits are held at once."""


def nats(head: nn.Module, states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """$-\\log p(y_s | h_s)$ of each position, ``[S]``.

    Args:
        head: gives logits ``[S, V]``.
        states: what enters it, $h$, ``[S, D]``.
        wanted: the words $y$, ``[S]``.
    """
    plain = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
    frozen = not any(p.requires_grad for p in head.parameters())
    if torch.is_grad_enabled() and plain and frozen and states.requires_grad:
        return _Chunked.apply(states, wanted, head)
    # Scoring needs no more than one chunk of logits at a time; a gradient of the head's weights needs them all.
    chunk = max(1, len(states)) if torch.is_grad_enabled() else CHUNK
    parts = zip(states.split(chunk), wanted.split(chunk), strict=True)
    return torch.cat([F.cross_entropy(head(part).float(), words, reduction="none") for part, words in parts])


class _Chunked(torch.autograd.Function):
    """Losses ``[S]``, with the gradient of the states alone."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, wanted: torch.Tensor, head: nn.Linear) -> torch.Tensor:
        losses, gradient = states.new_empty(len(states), dtype=torch.float32), torch.empty_like(states)
        for at in range(0, len(states), CHUNK):
            part, words = states[at : at + CHUNK], wanted[at : at + CHUNK, None]
            given = head(part)
            logits = given.float()  # [s, V]
            total = logits.logsumexp(1, keepdim=True)
            losses[at : at + CHUNK] = (total - logits.gather(1, words))[:, 0]
            # The gradient of -log p is p, less 1 at the word itself.
            p = logits.sub_(total).exp_()
            p.scatter_add_(1, words, p.new_full(words.shape, -1.0))
            gradient[at : at + CHUNK] = p.to(given.dtype) @ head.weight.to(given.dtype)
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        [gradient] = ctx.saved_tensors
        return gradient * grads[0][:, None].to(gradient.dtype), None, None
