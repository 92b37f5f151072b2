"""What the data of a run were, so that a later reader can tell whether they have the same.

Digests cover values, not their layout in memory: the same rows give the same digest from a CSV file, a memory-mapped
Parquet file and a list.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

ROWS = 10_000
"""Rows digested at a time."""


class Digest(Protocol):
    """A hash that is being computed."""

    def update(self, data: bytes | memoryview, /) -> None:
        """Take in more bytes."""
        ...


def content(dataset: Dataset) -> str:
    """SHA-256 of all rows and column names, in hexadecimal."""
    digest = hashlib.sha256()
    view = dataset.with_format("arrow")
    for start in range(0, len(dataset), ROWS):
        table = view[start : start + ROWS]
        for name in sorted(table.column_names):
            _text(digest, [name])
            column = table[name].combine_chunks()
            for chunk in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
                _array(digest, chunk)
    return digest.hexdigest()


def arrays(*values: np.ndarray) -> str:
    """SHA-256 of integer arrays, in hexadecimal."""
    digest = hashlib.sha256()
    for value in values:
        _numbers(digest, value)
    return digest.hexdigest()


def texts(values: Iterable[str]) -> str:
    """SHA-256 of a sequence of texts, in hexadecimal."""
    digest = hashlib.sha256()
    _text(digest, values)
    return digest.hexdigest()


def _text(digest: Digest, values: Iterable[str]) -> None:
    # With its length before it, no text can pass for the end of another.
    for value in values:
        data = value.encode()
        digest.update(len(data).to_bytes(8, "little") + data)


def _numbers(digest: Digest, values: np.ndarray) -> None:
    little = np.ascontiguousarray(values, dtype=np.dtype("<i8"))
    digest.update(len(little).to_bytes(8, "little"))
    digest.update(little.data.cast("B"))


def _array(digest: Digest, array: pa.Array) -> None:
    """Take in which values are missing, and the others."""
    kind = array.type
    if isinstance(array, pa.ExtensionArray):
        return _array(digest, array.storage)
    if pa.types.is_dictionary(kind):
        return _array(digest, array.dictionary_decode())
    if array.null_count:
        digest.update(b"missing")
        _numbers(digest, np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False)))
    digest.update(len(array).to_bytes(8, "little"))
    if pa.types.is_struct(kind):
        for field, inside in sorted(
            zip((f.name for f in kind), array.flatten(), strict=True), key=lambda pair: pair[0]
        ):
            _text(digest, [field])
            _array(digest, inside)
    elif pa.types.is_nested(kind) and not pa.types.is_map(kind) and not pa.types.is_union(kind):
        _numbers(digest, pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False))
        _array(digest, pc.list_flatten(array))
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        _bytes(digest, pc.fill_null(array, "").cast(pa.large_string()).cast(pa.large_binary()))
    elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        _bytes(digest, pc.fill_null(array, b"").cast(pa.large_binary()))
    elif pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        _numbers(digest, pc.fill_null(array.cast(pa.int64(), safe=False), 0).to_numpy(zero_copy_only=False))
    elif pa.types.is_floating(kind):
        # -0.0 and 0.0 are one number, and all NaN are one: adding zero and a fixed NaN make their bytes equal.
        floats = pc.fill_null(array.cast(pa.float64()), 0.0).to_numpy(zero_copy_only=False) + 0.0
        _numbers(digest, np.where(np.isnan(floats), np.nan, floats).astype("<f8").view("<i8"))
    else:
        _text(digest, (repr(value) for value in array.to_pylist()))
    return None


def _bytes(digest: Digest, array: Any) -> None:
    """Take in binary values without missing ones: their lengths, then their bytes as they lie."""
    _numbers(digest, pc.binary_length(array).to_numpy(zero_copy_only=False))
    offsets = np.frombuffer(array.buffers()[1], dtype=np.int64)[array.offset : array.offset + len(array) + 1]
    if len(offsets) and array.buffers()[2] is not None:
        digest.update(memoryview(array.buffers()[2])[int(offsets[0]) : int(offsets[-1])])
