"""Masks: long vectors of uniform numbers out of a seed of 32 bytes, by AES-256 in counter mode."""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

CHUNK = 1 << 20
"""Bytes of the stream in memory at a time."""


def stream(seed: bytes, size: int) -> bytes:
    """So many uniform bytes of a seed, which must serve nothing else."""
    return Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor().update(bytes(size))


def add(vector: NDArray[np.unsignedinteger], seed: bytes, sign: int = 1) -> None:
    """Add the mask of a seed to a vector, in place and modulo the size of its numbers.

    A stream begins at counter 0, so a seed must serve one mask only.

    Args:
        vector: ``[d]``, little-endian unsigned numbers of 4 or 8 bytes.
        seed: 32 bytes.
        sign: 1 adds, -1 takes away.
    """
    encryptor = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor()
    zeros = bytes(CHUNK)
    out = np.empty(CHUNK, np.uint8)
    mask = out.view(vector.dtype)
    operation = np.add if sign > 0 else np.subtract
    for at in range(0, len(vector), len(mask)):
        part = vector[at : at + len(mask)]
        length = part.nbytes
        encryptor.update_into(zeros if length == CHUNK else zeros[:length], out.data)
        operation(part, mask[: len(part)], out=part)
