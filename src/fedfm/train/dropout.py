"""Dropout by each client's own masks, so that who trains beside a client does not change what it draws.

Letters in shapes: C clients, R rows, T tokens of the longest row, N tokens that are computed, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from fedfm.train.packing import Packing


class Draws(TorchFunctionMode):
    """Within it, ``torch.nn.functional.dropout`` draws for each client from that client's generator.

    A client draws masks of the shapes that it would have alone, in the order of the model's layers.

    Args:
        generators: of the clients, in the order of their rows.
    """

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        super().__init__()
        self.generators = list(generators)
        self.packing: Packing | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.dropout:
            return func(*args, **kwargs)
        return self._dropout(*args, **kwargs)

    def _dropout(
        self, input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> torch.Tensor:
        if not training or p == 0:
            return input
        packing = self.packing
        assert packing is not None
        mask = input.new_empty(input.shape)
        if len(input) == 1 and input.dim() > 1 and input.shape[1] == packing.size:  # [1, N, D]
            for c, draw in enumerate(self.generators):
                mask[0, packing.tokens[c] : packing.tokens[c + 1]].bernoulli_(1 - p, generator=draw)
        elif len(input) == packing.rows[-1]:  # [R, T, D] or [R, D]
            mask.fill_(1 - p)
            # A prompt makes rows longer before the blocks, where the packing learns of it, are reached.
            more = input.shape[1] - packing.width if input.dim() > 2 else 0
            for c, draw in enumerate(self.generators):
                part = slice(packing.rows[c], packing.rows[c + 1])
                own = mask[part] if input.dim() < 3 else mask[part, : self._width(c) + more]
                own.copy_(torch.empty_like(own).bernoulli_(1 - p, generator=draw))
        else:
            raise ValueError(f"dropout of shape {tuple(input.shape)} in a batch of {packing.rows[-1]} rows")
        return input * mask.div_(1 - p)

    def square(self, weights: torch.Tensor, p: float, packing: Packing) -> torch.Tensor:
        """Attention's weights ``[R, H, T, T]`` with some dropped."""
        mask = weights.new_ones(weights.shape)
        for c, draw in enumerate(self.generators):
            part, width = slice(packing.rows[c], packing.rows[c + 1]), self._width(c)
            own = mask[part, :, :width, :width]
            own.copy_(torch.empty_like(own).bernoulli_(1 - p, generator=draw))
        return weights * mask.div_(1 - p)

    def _width(self, client: int) -> int:
        """Tokens of the client's longest row: the T that it would have alone."""
        assert self.packing is not None
        return int(self.packing.lengths[self.packing.rows[client] : self.packing.rows[client + 1]].max())
