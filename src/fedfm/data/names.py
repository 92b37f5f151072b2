"""Names of clients: sequences of ids that cost no Python object per client.

Letters in shapes: C clients.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

LONGEST = 80
"""Characters of an id that comes from data."""

BLOCK = 65_536
"""Ids made at a time while iterating."""


class Ids(Sequence[str]):
    """Unique ids of clients, made when they are looked at."""

    @abstractmethod
    def _block(self, start: int, stop: int) -> list[str]:
        """The ids from ``start`` up to ``stop``."""

    @abstractmethod
    def find(self, id: str) -> int:
        """Position of ``id``, or -1."""

    @abstractmethod
    def take(self, positions: np.ndarray) -> Ids:
        """The ids at these increasing positions, int64 ``[C]``."""

    @abstractmethod
    def ordered(self) -> Ids:
        """The same ids in the order in which Python sorts texts."""

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> list[str]: ...
    def __getitem__(self, at: int | slice) -> str | list[str]:
        if isinstance(at, slice):
            start, stop, step = at.indices(len(self))
            return self._block(start, stop) if step == 1 else [self[i] for i in range(start, stop, step)]
        position = at + len(self) if at < 0 else at
        if not 0 <= position < len(self):
            raise IndexError(f"there is no client number {at}: the federation has {len(self)}.")
        return self._block(position, position + 1)[0]

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), BLOCK):
            yield from self._block(start, min(start + BLOCK, len(self)))

    def __contains__(self, id: object) -> bool:
        return isinstance(id, str) and self.find(id) >= 0

    def index(self, value: Any, start: int = 0, stop: int | None = None) -> int:
        """Position of an id, in logarithmic time."""
        position = self.find(value) if isinstance(value, str) else -1
        if not start <= position < (len(self) if stop is None else stop):
            raise ValueError(f"{value!r} is not a client")
        return position

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self[:3]))
        return f"<{len(self)} ids: {shown}{', ...' if len(self) > 3 else ''}>"


class Numbered(Ids):
    """``client-00042``: the number with as many digits for all, so that the order of names is the order of numbers.

    Args:
        numbers: increasing numbers, a range or int64 ``[C]``.
        width: digits, at least 5.

    >>> list(Numbered.first(2))
    ['client-00000', 'client-00001']
    """

    def __init__(self, numbers: range | np.ndarray, width: int) -> None:
        self.numbers = numbers
        self.width = width

    @classmethod
    def first(cls, count: int) -> Numbered:
        """The ids of clients 0 to ``count`` - 1."""
        return cls(range(count), max(5, len(str(count - 1))))

    def __len__(self) -> int:
        return len(self.numbers)

    def _block(self, start: int, stop: int) -> list[str]:
        return [f"client-{int(n):0{self.width}d}" for n in self.numbers[start:stop]]

    def find(self, id: str) -> int:
        if not re.fullmatch(rf"client-[0-9]{{{self.width}}}", id):
            return -1
        number = int(id.removeprefix("client-"))
        position = bisect_left(self.numbers, number)
        return position if position < len(self) and self.numbers[position] == number else -1

    def ordered(self) -> Numbered:
        return self

    def take(self, positions: np.ndarray) -> Numbered:
        return Numbered(np.asarray(self.numbers, dtype=np.int64)[positions], self.width)


class Named(Ids):
    """Given names, held as one Arrow array.

    Args:
        names: unique strings, ``[C]``, in the order of the clients.
    """

    def __init__(self, names: pa.Array) -> None:
        self.names = names.cast(pa.large_string())
        self._sorter = pc.array_sort_indices(self.names).to_numpy()

    def __len__(self) -> int:
        return len(self.names)

    def _block(self, start: int, stop: int) -> list[str]:
        return self.names.slice(start, max(0, stop - start)).to_pylist()

    def find(self, id: str) -> int:
        # Arrow sorts by UTF-8 bytes, whose order is the order of code points, by which Python compares.
        at = bisect_left(self._sorter, id, key=lambda position: self.names[int(position)].as_py())
        found = at < len(self) and self.names[int(self._sorter[at])].as_py() == id
        return int(self._sorter[at]) if found else -1

    def ordered(self) -> Named:
        return self.take(self._sorter)

    def take(self, positions: np.ndarray) -> Named:
        return Named(self.names.take(pa.array(positions)))


def named(values: Iterable[str] | pa.Array) -> Named:
    """Ids from values: on one line, at most ``LONGEST`` characters, ``empty`` for nothing, ``~2`` for a second one.

    >>> list(named(["Ann", "  Ann ", ""]))
    ['Ann', 'Ann~2', 'empty']
    """
    raw = values if isinstance(values, pa.Array) else pa.array(list(values), pa.string())
    text = pc.replace_substring_regex(raw, r"[\pZ\p{Cc}]+", " ")
    text = pc.utf8_slice_codeunits(pc.utf8_trim_whitespace(text), 0, LONGEST)
    text = pc.utf8_trim_whitespace(text)
    text = pc.if_else(pc.equal(text, ""), "empty", text)
    if pc.count_distinct(text).as_py() < len(text):
        text = pa.array(_distinct(text.to_pylist()), pa.string())
    return Named(text)


def _distinct(names: list[str]) -> list[str]:
    """Number the second and later clients of one name; a numbered name never takes one that exists."""
    taken, used, out = set(names), Counter[str](), []
    for name in names:
        used[name] += 1
        new = name
        if used[name] > 1:
            while (new := f"{name}~{used[name]}") in taken:
                used[name] += 1
            taken.add(new)
        out.append(new)
    return out
