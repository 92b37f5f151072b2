"""Which rows belong to which client, flat: 8 bytes a row and 8 bytes a client.

Letters in shapes: N rows assigned, C clients.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedfm.core import seeds
from fedfm.data.names import Ids


@dataclass(frozen=True, eq=False)
class Assignment:
    """Client i owns rows ``order[offsets[i]:offsets[i + 1]]``.

    Args:
        ids: names of the clients, ``[C]``.
        order: numbers of rows, client after client, int64 ``[N]``.
        offsets: where each client begins, int64 ``[C + 1]``.
    """

    ids: Ids
    order: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, ids: Ids, order: np.ndarray, sizes: np.ndarray) -> Assignment:
        """The assignment of ``sizes[i]`` consecutive rows of ``order`` to client i."""
        offsets = np.zeros(len(sizes) + 1, dtype=np.int64)
        np.cumsum(sizes, out=offsets[1:])
        return cls(ids, np.ascontiguousarray(order[: offsets[-1]], dtype=np.int64), offsets)

    @property
    def sizes(self) -> np.ndarray:
        """Rows of each client, int64 ``[C]``."""
        return np.diff(self.offsets)

    def rows(self, client: int) -> np.ndarray:
        """Rows of the client at this position, a view."""
        return self.order[self.offsets[client] : self.offsets[client + 1]]

    def places(self, clients: np.ndarray) -> np.ndarray:
        """Places in ``order`` of these clients' rows, client after client."""
        sizes = self.sizes[clients]
        ends = np.cumsum(sizes)
        return np.repeat(self.offsets[clients] - ends + sizes, sizes) + np.arange(sizes.sum())

    def take(self, clients: np.ndarray) -> Assignment:
        """The assignment of some clients, at increasing positions int64 ``[C]``."""
        return Assignment.of(self.ids.take(clients), self.order[self.places(clients)], self.sizes[clients])

    def capped(self, most: int, seed: int) -> Assignment:
        """At most ``most`` rows of each client, drawn by the seed, in their order."""
        sizes = self.sizes
        if not len(sizes) or sizes.max() <= most:
            return self
        owner = np.repeat(np.arange(len(sizes)), sizes)
        # A random order of all rows, sorted by client without changing it, is a random order within each client.
        drawn = seeds.numpy_generator(seed, "partition", "cap").permutation(len(owner))
        drawn = drawn[np.argsort(owner[drawn], kind="stable")]
        kept = np.sort(drawn[np.arange(len(owner)) - self.offsets[owner] < most])
        return Assignment.of(self.ids, self.order[kept], np.minimum(sizes, most))
