"""Gated feed-forward layers that keep two wide tensors for the backward instead of three.

Llama and its relatives compute $D(\\mathrm{silu}(G x) \\odot U x)$. Left to itself, autograd keeps G x, silu(G x) and
U x, which are most of what a block keeps where only adapters are trained; here silu(G x) is computed again, which costs
less than fetching it. The numbers are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


class _Gated(torch.autograd.Function):
    """$\\mathrm{silu}(g) \\odot u$, any shape."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        [grad], (gate, up) = grads, ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def gated(model: nn.Module) -> list[nn.Module]:
    """The layers of a model that are of this kind."""
    found = []
    for module in model.modules():
        parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        silu = type(getattr(module, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")
        # Experts have the same parts, but are no module with one input.
        # A forward with dropout in it does more than these parts.
        drops = any(isinstance(part, nn.Dropout) for part in module.modules())
        if all(isinstance(part, nn.Module) for part in parts) and silu and not drops and "forward" not in vars(module):
            found.append(module)
    return found


@contextmanager
def lean(layers: list[nn.Module]) -> Iterator[None]:
    """Within it, these layers keep less."""

    def forward(layer: Any) -> Any:
        return lambda x: layer.down_proj(_Gated.apply(layer.gate_proj(x), layer.up_proj(x)))

    try:
        for layer in layers:
            # An attribute of the instance stands before the method of its class.
            layer.forward = forward(layer)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
