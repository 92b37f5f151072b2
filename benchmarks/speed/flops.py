"""How many operations training takes, and how many the device could do.

    FLOP of a text = 4 N T + 4 V D S + 6 R T + 12 L D T^2

with N weights of the frozen linear layers in the blocks, V D of the head, R of the adapter, L blocks of width D, T
tokens of which S are supervised. A frozen weight costs 2 forward and 2 for the gradient of its input, a trained one 2
more; attention costs 4 D T^2 forward in a block, as if it were not causal, and twice that backward. The limit is a
product of two large bfloat16 matrices.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import nn

from fedfm.train.bench import Bench


def flops(bench: Bench, length: int) -> float:
    """Operations of training on a text of so many tokens, all but the first of them supervised."""
    tuned = {id(p) for p in bench.space.parameters.values()}
    adapter = sum(p.numel() for p in bench.space.parameters.values())
    net = bench.loaded.model
    head = net.get_output_embeddings().weight
    linear = [m.weight for m in net.modules() if isinstance(m, nn.Linear)]
    frozen = sum(w.numel() for w in linear if id(w) not in tuned and w is not head)
    config = net.config
    attention = 12 * config.num_hidden_layers * config.hidden_size * length**2
    return 4 * frozen * length + 4 * head.numel() * (length - 1) + 6 * adapter * length + attention


def limit(device: str, n: int, repeats: int = 20, dtype: torch.dtype = torch.bfloat16) -> float:
    """Operations a second of a product of two matrices ``[n, n]``."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for turn in range(repeats + 3):  # the first ones warm up
        seconds.append(timed(lambda: torch.mm(a, b), device))
        if turn == 2:
            seconds.clear()
    return 2 * n**3 / statistics.median(seconds)


def timed(work: Callable[[], object], device: str) -> float:
    """Seconds until the device has done it."""
    wait(device)
    began = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - began


def wait(device: str) -> None:
    """Until the device has done all it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def waits(work: Callable[[], object], device: str) -> int | None:
    """How often the host waits for the card meanwhile, as far as torch notices; ``None`` without a card."""
    if device != "cuda":
        return None
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in found)
