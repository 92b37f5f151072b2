"""Digests cover values, and nothing but values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Features, Value, concatenate_datasets

from fedfm.data import manifest

ROWS = [
    {"text": "ä", "n": 1, "x": 0.5, "on": True, "messages": [{"role": "user", "content": "q"}], "v": [1.0, 2.0]},
    {"text": "", "n": None, "x": -0.0, "on": False, "messages": [], "v": []},
    {"text": None, "n": -3, "x": None, "on": None, "messages": [{"role": "user", "content": None}], "v": [0.1]},
]


def digest(rows: list[dict[str, Any]]) -> str:
    return manifest.content(Dataset.from_list(rows))


def test_the_layout_in_memory_does_not_matter() -> None:
    whole = Dataset.from_list(ROWS)
    expected = manifest.content(whole)
    pieces = concatenate_datasets([Dataset.from_list([r], features=whole.features) for r in ROWS])
    assert manifest.content(pieces) == expected
    assert manifest.content(Dataset.from_list([ROWS[1], *ROWS]).select([1, 2, 3])) == expected
    assert manifest.content(whole.select([2, 1, 0]).select([2, 1, 0])) == expected
    assert manifest.content(whole.select_columns(sorted(whole.column_names))) == expected
    large = whole.cast(Features(dict(whole.features) | {"text": Value("large_string")}))
    assert manifest.content(large) == expected


@pytest.mark.parametrize(
    ("row", "column", "value"),
    [
        (0, "text", "a"),
        (1, "text", None),
        (2, "n", -4),
        (1, "n", 0),
        (1, "x", 0.25),
        (1, "on", True),
        (1, "messages", [{"role": "user", "content": ""}]),
        (0, "messages", [{"role": "user", "content": "r"}]),
        (0, "v", [2.0, 1.0]),
        (1, "v", [0.1]),
    ],
)
def test_every_value_matters(row: int, column: str, value: Any) -> None:
    changed = [dict(r) for r in ROWS]
    changed[row][column] = value
    assert digest(changed) != digest(ROWS)


def test_order_names_and_borders_matter() -> None:
    assert digest(ROWS[::-1]) != digest(ROWS)
    assert digest([{"a": "x"}]) != digest([{"b": "x"}])
    assert digest([{"a": "xy"}, {"a": ""}]) != digest([{"a": "x"}, {"a": "y"}])
    assert manifest.arrays(np.arange(3), np.arange(2)) != manifest.arrays(np.arange(2), np.arange(3))
    assert manifest.texts(["ab", "c"]) != manifest.texts(["a", "bc"])


def test_rows_beyond_the_first_block_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "ROWS", 2)
    rows = [{"n": i} for i in range(5)]
    assert digest(rows) != digest([*rows[:4], {"n": 9}])


def test_a_known_digest() -> None:
    # sha256 of: 3 as 8 little-endian bytes, then 0, 1 and 2 likewise.
    import hashlib

    expected = hashlib.sha256(b"".join(n.to_bytes(8, "little") for n in (3, 0, 1, 2))).hexdigest()
    assert manifest.arrays(np.arange(3, dtype=np.int32)) == expected
