"""Randomness as a function of names: every draw comes from (run seed, names...), never from the global generator.

So a resumed run, a fused run and a distributed run draw the same numbers, and a new draw in one place moves no other.
"""

from __future__ import annotations

import hashlib
import operator

import numpy as np
import torch


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the draw called ``names`` in the run ``seed``.

    The names are hashed with their types and lengths, so ``("a", "bc")`` and ``("ab", "c")`` differ.

    >>> derive(0, "sampler", 1) == derive(0, "sampler", 1)
    True
    >>> derive(0, "sampler", 1) == derive(0, "sampler", 2)
    False
    """
    plain = tuple(str(name) if isinstance(name, str) else operator.index(name) for name in (seed, *names))
    digest = hashlib.blake2b(repr(plain).encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, *names: str | int, device: str | torch.device = "cpu") -> torch.Generator:
    """A torch generator for the draw called ``names``."""
    return torch.Generator(device=device).manual_seed(derive(seed, *names))


def numpy_generator(seed: int, *names: str | int) -> np.random.Generator:
    """A NumPy generator for the draw called ``names``."""
    return np.random.default_rng(derive(seed, *names))


def seed_torch(seed: int, device: torch.device) -> None:
    """Seed torch's own generators, of the processor and of ``device``, for layers that draw from these.

    ``torch.manual_seed`` would also queue a call, with a stack trace, for every kind of device that is absent: that
    takes milliseconds and is never let go.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
