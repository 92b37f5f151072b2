"""Which examples make up each local step, and the cache of tokenised examples."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

import torch

from fedfm.tasks.task import Example


def batches(lengths: Sequence[int], size: int, draw: torch.Generator, by_length: bool) -> Iterator[list[int]]:
    """Indices of batch after batch, without end: each pass over the examples is a new permutation.

    Args:
        lengths: tokens of each example.
        size: examples of a batch; the last one of a pass may be smaller.
        draw: source of the permutations.
        by_length: form batches of similar length within chunks of 50 batches, so that order stays random at large.
    """
    while True:
        order = torch.randperm(len(lengths), generator=draw).tolist()
        if by_length:
            chunk = 50 * size
            order = [
                i
                for at in range(0, len(order), chunk)
                for i in sorted(order[at : at + chunk], key=lambda i: -lengths[i])
            ]
        groups = [order[at : at + size] for at in range(0, len(order), size)]
        if by_length:
            groups = [groups[i] for i in torch.randperm(len(groups), generator=draw).tolist()]
        yield from groups


GROUP = 8
"""Examples that go through frozen lower blocks together."""


class Split:
    """The tokenised examples of one client's split, and what was computed of them once.

    Args:
        examples: in the order of the rows.
    """

    def __init__(self, examples: list[Example]) -> None:
        self.examples = examples
        order = sorted(range(len(examples)), key=lambda i: len(examples[i]))
        self.groups = [order[at : at + GROUP] for at in range(0, len(order), GROUP)]
        """Fixed groups of similar length, by index."""
        self.group_of = {i: g for g, group in enumerate(self.groups) for i in group}
        self.hidden: dict[int, torch.Tensor] = {}
        """What enters the lowest tuned block, by index, ``[T, D]``."""

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def nbytes(self) -> int:
        """Memory of the tensors held."""
        tokens = sum(16 * len(e) for e in self.examples)
        return tokens + sum(h.numel() * h.element_size() for h in self.hidden.values())


class Encoded:
    """Tokenised examples by client and split, each made once; the least recently used go when there are too many.

    Args:
        encode: makes the examples of (client id, split).
        limit: bytes kept, over all clients.
    """

    def __init__(self, encode: Callable[[str, str], list[Example]], limit: int = 1 << 30) -> None:
        self._encode = encode
        self._limit = limit
        self._held: OrderedDict[tuple[str, str], Split] = OrderedDict()
        self._sizes: dict[tuple[str, str], int] = {}
        self._total = 0

    def __call__(self, client: str, split: str) -> Split:
        """The examples of a client's split."""
        key = (client, split)
        if key not in self._held:
            self._held[key] = Split(self._encode(client, split))
        self._held.move_to_end(key)
        return self._held[key]

    def settle(self, client: str, split: str) -> None:
        """After work on a split: count what it holds now, and let the oldest splits go if that is too much."""
        key = (client, split)
        size = self._held[key].nbytes
        self._total += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        while self._total > self._limit and len(self._held) > 1:
            gone, _ = self._held.popitem(last=False)
            self._total -= self._sizes.pop(gone, 0)
