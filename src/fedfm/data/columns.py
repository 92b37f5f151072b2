"""Columns of a data set: read them as they lie in memory, name them, find classes in them.

Letters in shapes: N rows, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from fedfm.errors import DataError, nearest


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of ``datasets`` inside; they would break into those of a run."""
    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()


def require(name: str, have: Iterable[str], what: str) -> None:
    """Raise ``DataError`` unless ``name`` is one of the columns ``have``; ``what`` says who needs it."""
    columns = sorted(have)
    if name not in columns:
        raise DataError(
            f"{what} needs a column {name!r}, which the data does not have.{nearest(name, columns)} "
            f"It has {', '.join(columns) or 'none'}."
        )


def read(dataset: Dataset, name: str, what: str) -> pa.ChunkedArray:
    """One column as an Arrow array, ``[N]``.

    Raises:
        DataError: no such column.
    """
    require(name, dataset.column_names, what)
    return dataset.select_columns([name]).with_format("arrow")[:][name]


def encode(dataset: Dataset, name: str, what: str) -> tuple[np.ndarray, pa.Array]:
    """The value of each row as a number, and the values in increasing order.

    Returns:
        int64 ``[N]`` with numbers 0 to K-1, and the distinct values ``[K]``.

    Raises:
        DataError: no such column, a row without a value, or values that are lists or mappings.
    """
    column = read(dataset, name, what)
    if pa.types.is_nested(column.type):
        raise DataError(
            f"{what} needs a column of single values, such as text or numbers, but {name!r} holds {column.type}. "
            "Choose another column."
        )
    if column.null_count:
        missing = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise DataError(
            f"{what} needs a value of {name!r} in each row, but {column.null_count} of {len(column)} rows have none, "
            f"the first is row {missing}. Fill them in or remove these rows."
        )
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    coded = column.combine_chunks().dictionary_encode()
    if isinstance(coded, pa.ChunkedArray):
        coded = coded.combine_chunks()
    ascending = pc.array_sort_indices(coded.dictionary).to_numpy()
    rank = np.empty(len(ascending), dtype=np.int64)
    rank[ascending] = np.arange(len(ascending))
    return rank[coded.indices.to_numpy()], coded.dictionary.take(pa.array(ascending))


def names(dataset: Dataset, name: str, values: pa.Array) -> list[str]:
    """How a person would write the values of a column: class names where the column has them."""
    feature = dataset.features[name]
    if isinstance(feature, ClassLabel):
        return [feature.int2str(v) if v >= 0 else "unlabelled" for v in values.to_pylist()]
    return [str(v) for v in values.to_pylist()]


def rename(dataset: Dataset, columns: Mapping[str, str | Sequence[str]], where: str) -> Dataset:
    """The data set with columns under the names that tasks use.

    Args:
        columns: from the name a task uses to the column's name, or to several whose texts are joined by a line break.
        where: the data set, for error messages.

    Raises:
        DataError: no such column, or one used twice.
    """
    sources = {target: [s] if isinstance(s, str) else list(s) for target, s in columns.items()}
    used: set[str] = set()
    for target, parts in sources.items():
        if not parts:
            raise DataError(f"columns.{target} of {where} names no column. It takes one name or a list of names.")
        for part in parts:
            require(part, dataset.column_names, f"columns.{target} of {where}")
            if part in used:
                raise DataError(f"columns of {where} uses {part!r} twice. Use each column once.")
            used.add(part)
    joined = {target: parts for target, parts in sources.items() if len(parts) > 1}
    renamed = {parts[0]: target for target, parts in sources.items() if len(parts) == 1}
    if joined:
        with quiet():
            spent = sorted({p for parts in joined.values() for p in parts})
            # Under another name first, so that a target may have the name of a column that is still to be read.
            dataset = dataset.map(_join, batched=True, fn_kwargs={"parts": joined}, remove_columns=spent)
        renamed |= {_joined(target): target for target in joined}
    moved = {source: target for source, target in renamed.items() if source != target}
    replaced = [t for t in moved.values() if t in dataset.column_names and t not in moved]
    return dataset.remove_columns(replaced).rename_columns(moved)


def _joined(target: str) -> str:
    return f"{target} (joined)"


def _join(batch: Mapping[str, list[Any]], parts: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    return {
        _joined(target): [
            "\n".join(str(t) for t in texts if t is not None)
            for texts in zip(*(batch[c] for c in columns), strict=True)
        ]
        for target, columns in parts.items()
    }


def classes(dataset: Dataset, name: str = "label") -> Dataset:
    """The data set with classes 0 to K-1 in ``name``, and their names in its feature.

    Texts become the positions of the sorted names; integers that do not run from 0 keep their numbers as names. Numbers
    with fractions are targets of a regression and stay.
    """
    feature = dataset.features[name]
    if isinstance(feature, ClassLabel):
        return dataset
    column = read(dataset, name, "the label")
    if pa.types.is_floating(column.type):
        if column.null_count == 0 and not pc.all(pc.equal(pc.floor(column), column)).as_py():
            return dataset
        # CSV readers turn integers into floats where a chunk of the file has gaps.
        if column.null_count == 0:
            dataset = dataset.remove_columns([name]).add_column(name, column.cast(pa.int64()).to_numpy())
    booleans = pa.types.is_boolean(column.type)
    codes, values = encode(dataset, name, "the label")
    known = ["no", "yes"] if booleans and len(values) == 2 else [str(v) for v in values.to_pylist()]
    # Only the labels come into memory; the other columns stay where they are mapped from.
    return dataset.remove_columns([name]).add_column(name, codes, feature=ClassLabel(names=known))
