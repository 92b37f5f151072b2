"""Ids of clients."""

from __future__ import annotations

import numpy as np
import pytest

from fedfm.data.names import Named, Numbered, named


def test_numbered_names_are_made_when_looked_at() -> None:
    ids = Numbered.first(1_000_000)
    assert len(ids) == 1_000_000
    assert (ids[42], ids[-1]) == ("client-000042", "client-999999")
    assert ids[7:9] == ["client-000007", "client-000008"]
    assert ids.index("client-000042") == 42
    assert "client-00042" not in ids  # five digits name nobody here
    assert "client-٠٠٠٠٤٢" not in ids
    assert ids.find("client-1000000") == -1
    with pytest.raises(IndexError, match="no client number 1000000"):
        ids[1_000_000]


def test_some_of_the_numbered() -> None:
    ids = Numbered.first(10).take(np.array([2, 5, 9]))
    assert list(ids) == ["client-00002", "client-00005", "client-00009"]
    assert [ids.find(i) for i in ids] == [0, 1, 2]
    assert ids.find("client-00003") == -1


def test_names_are_found_in_any_order() -> None:
    ids = named(["zoe", "ann", "Émile", "bob"])
    assert isinstance(ids, Named)
    assert list(ids) == ["zoe", "ann", "Émile", "bob"]
    assert [ids.find(i) for i in ids] == [0, 1, 2, 3]
    assert ids.find("carl") == -1
    some = ids.take(np.array([0, 2]))
    assert (list(some), some.find("Émile"), some.find("ann")) == (["zoe", "Émile"], 1, -1)


def test_names_from_data_are_one_line_each_and_unique() -> None:
    ids = named(["a\nb", "a b", "a b~2", "", " \t", "x" * 200, "\x1b[31mred"])
    assert list(ids) == ["a b", "a b~3", "a b~2", "empty", "empty~2", "x" * 80, "[31mred"]


def test_iterating_goes_over_all_blocks() -> None:
    ids = Numbered.first(140_000)
    assert list(ids) == [f"client-{i:06d}" for i in range(140_000)]
    with pytest.raises(ValueError, match="'nobody' is not a client"):
        ids.index("nobody")
