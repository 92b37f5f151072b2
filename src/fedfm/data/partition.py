"""Which rows belong to which client: by chance, by size, or as the data say.

The partitions are those of ``flwr_datasets.partitioner`` and deal the same rows to the same clients (tested against
it). They are computed here with NumPy because its interface hands out one client at a time, each as a data set with an
index of its own: a minute and more for 100,000 clients, where three flat arrays take milliseconds.

Where chance or size decides, rows are dealt in an order drawn from the seed.

Letters in shapes: N rows, C clients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
from datasets import Dataset

from fedfm.core import seeds
from fedfm.data import columns
from fedfm.data.assignment import Assignment
from fedfm.data.names import Numbered, named
from fedfm.errors import DataError, RecipeError


class Partition(ABC):
    """Subclasses are frozen dataclasses of the partition's settings."""

    id: ClassVar[str]

    @abstractmethod
    def assign(self, dataset: Dataset, seed: int) -> Assignment:
        """Deal the rows of ``dataset``. The same seed deals the same."""


def at_least(partition: Partition, field: str, least: int) -> None:
    """Raise ``RecipeError`` unless a setting is at least ``least``."""
    value = getattr(partition, field)
    if value < least:
        raise RecipeError(f"partition {partition.id!r}: {field} must be at least {least}, but is {value}.")


def enough(partition: Partition, clients: int, rows: int) -> None:
    """Raise ``DataError`` unless there is a row for each client."""
    if clients > rows:
        raise DataError(
            f"partition {partition.id!r}: num_clients must be at most the number of rows, {rows}, but is {clients}. "
            "Lower it or use more data."
        )


def shuffled(count: int, seed: int) -> np.ndarray:
    """All row numbers in an order drawn from the seed, int64 ``[N]``."""
    return seeds.numpy_generator(seed, "partition", "rows").permutation(count)


@dataclass(frozen=True)
class Iid(Partition):
    """Rows dealt by chance, as evenly as can be.

    Args:
        num_clients: clients, C.
    """

    id: ClassVar[str] = "iid"

    num_clients: int

    def __post_init__(self) -> None:
        at_least(self, "num_clients", 1)

    def assign(self, dataset: Dataset, seed: int) -> Assignment:
        enough(self, self.num_clients, len(dataset))
        each, more = divmod(len(dataset), self.num_clients)
        sizes = each + (np.arange(self.num_clients) < more)
        return Assignment.of(Numbered.first(self.num_clients), shuffled(len(dataset), seed), sizes)


@dataclass(frozen=True)
class SizeSkew(Partition):
    """Rows dealt by chance, to some clients many and to others few.

    Client i of C (from 1) has floor(N u_i / sum u) rows with u_i = i, i^2 or e^i; the last one also what is left over.
    The first clients may have no rows: set ``min_examples: 1`` to leave them out.

    Args:
        num_clients: clients, C.
        skew: how the size grows with the number of the client.
    """

    id: ClassVar[str] = "size-skew"

    num_clients: int
    skew: Literal["linear", "square", "exponential"] = "linear"

    def __post_init__(self) -> None:
        at_least(self, "num_clients", 1)
        if self.skew not in ("linear", "square", "exponential"):
            raise RecipeError(
                f"partition 'size-skew': skew must be linear, square or exponential, but is {self.skew!r}."
            )

    def assign(self, dataset: Dataset, seed: int) -> Assignment:
        number = np.linspace(1, self.num_clients, self.num_clients)
        # Divided by e^C, which no fraction notices, e^i stays finite.
        units = {"linear": number, "square": number**2, "exponential": np.exp(number - self.num_clients)}[self.skew]
        sizes = (units / units.sum() * len(dataset)).astype(np.int64)
        sizes[-1] += len(dataset) - sizes.sum()
        return Assignment.of(Numbered.first(self.num_clients), shuffled(len(dataset), seed), sizes)


@dataclass(frozen=True)
class Natural(Partition):
    """A client for each value of a column: a hospital, a writer, a topic.

    Args:
        column: whose values are the clients; their order is the order of the clients.
    """

    id: ClassVar[str] = "natural"

    column: str

    def assign(self, dataset: Dataset, seed: int) -> Assignment:
        codes, values = columns.encode(dataset, self.column, "partition 'natural'")
        text = pa.array(columns.names(dataset, self.column, values), pa.string())
        order = np.argsort(codes, kind="stable")
        return Assignment.of(named(text), order, np.bincount(codes, minlength=len(values)))
