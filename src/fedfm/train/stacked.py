"""Linear layers with one weight per client, beside frozen layers that all clients share.

The rows of a batch stand client after client, the same number for each. A layer that is frozen sees one tall batch; a
layer that is tuned multiplies each client's rows by that client's own weight, in one batched matrix product.

Letters in shapes: C clients, B rows of each, T tokens, R rank or outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from fedfm.spaces.space import Attached


class Unstackable(Exception):
    """The model uses a tuned layer in a way that rows of several clients cannot share."""


@dataclass
class Stacked:
    """The tuned linear layers of a model, ready to hold a weight per client.

    Args:
        places: each layer with the public names of its weight and its bias, ``None`` for what is not tuned.
        rows: rows of the batch that runs now, C*B; a tuned layer refuses an input with another number.
    """

    places: list[tuple[nn.Linear, str | None, str | None]]
    rows: int = field(default=0)

    @classmethod
    def of(cls, space: Attached) -> Stacked | None:
        """The tuned layers of a space; ``None`` when a tuned tensor is not in a plain linear layer."""
        names = {id(p): name for name, p in space.parameters.items()}
        places, found = [], 0
        for module in space.model.modules():
            mine = {k: names[id(p)] for k, p in module._parameters.items() if id(p) in names}
            # Kinds of LoRA other than the plain one read the factors without running them as layers.
            if getattr(module, "lora_variant", None):
                return None
            if not mine:
                continue
            if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
                return None
            places.append((module, mine.get("weight"), mine.get("bias")))
            found += len(mine)
        # A tensor in two layers would be one parameter with two places.
        return cls(places) if found == len(names) else None

    @contextmanager
    def holding(self, stacks: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Within it, the tuned layers use ``stacks``: by name, ``[C, ...]``; they are read anew in each forward."""
        try:
            for layer, weight, bias in self.places:
                # An attribute of the instance stands before the method of its class.
                layer.forward = self._forward(layer, stacks, weight, bias)  # type: ignore[method-assign]
            yield
        finally:
            for layer, _, _ in self.places:
                layer.__dict__.pop("forward", None)

    def _forward(self, layer: nn.Linear, stacks: Mapping[str, torch.Tensor], weight: str | None, bias: str | None):  # type: ignore[no-untyped-def]
        def forward(x: torch.Tensor) -> torch.Tensor:
            if x.shape[0] != self.rows:
                raise Unstackable(f"a tuned layer got {x.shape[0]} rows of a batch of {self.rows}")
            w = stacks[weight] if weight else None  # [C, R, in]
            b = stacks[bias] if bias else None  # [C, R]
            clients = len(w if w is not None else b)  # type: ignore[arg-type]
            flat = x.reshape(clients, -1, x.shape[-1])  # [C, B*T, in]
            if w is None:
                out = F.linear(flat, layer.weight)
            elif b is not None:
                out = torch.baddbmm(b[:, None], flat, w.transpose(1, 2))
            else:
                out = torch.bmm(flat, w.transpose(1, 2))
            if w is None and b is not None:
                out = out + b[:, None]
            elif b is None and layer.bias is not None:
                out = out + layer.bias
            return out.view(*x.shape[:-1], -1)

        return forward


def clip(gradients: list[torch.Tensor], limit: float) -> None:
    """Scale each client's gradients to a common norm of at most ``limit``, in place; ``[C, ...]`` each."""
    norms = torch.linalg.vector_norm(torch.stack([g.flatten(1).norm(dim=1) for g in gradients]), dim=0)  # [C]
    factors = (limit / (norms + 1e-6)).clamp(max=1.0)
    for g in gradients:
        g.mul_(factors.view(-1, *[1] * (g.dim() - 1)).to(g.dtype))


def keep(stacks: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer | None, clients: int) -> None:
    """Let go of all clients but the first ones, with their optimizer state."""
    for stack in stacks.values():
        stack.data = stack.data[:clients].clone()
        state = optimizer.state.get(stack, {}) if optimizer else {}
        # The count of steps, of no dimension, is one number for all.
        state |= {
            n: moment[:clients].clone() for n, moment in state.items() if torch.is_tensor(moment) and moment.dim()
        }
