"""Which rows belong to which client, where labels decide: the partitioners of ``flwr_datasets``.

They see a data set of two columns, the number of a row and its label, and deal the rows of a label in the order in
which they lie; so that order is drawn from the seed first.

Letters in shapes: N rows, C clients, K classes.
"""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from datasets import Dataset
from flwr_datasets.partitioner import (
    DirichletPartitioner,
    Partitioner,
    PathologicalPartitioner,
    ShardPartitioner,
)

from fedfm.core import seeds
from fedfm.data import columns
from fedfm.data.assignment import Assignment
from fedfm.data.names import Numbered
from fedfm.data.partition import Partition, at_least, enough, shuffled
from fedfm.errors import DataError, RecipeError

LABEL = "label"
"""Column of the classes in the data set that the partitioners see."""


@dataclass(frozen=True)
class ByLabel(Partition):
    """Partitions of Flower that look at one column."""

    def deal(self, dataset: Dataset, seed: int, clients: int, column: str) -> Assignment:
        """Deal the rows with Flower's partitioner."""
        enough(self, clients, len(dataset))
        codes, values = columns.encode(dataset, column, f"partition {self.id!r}")
        names = columns.names(dataset, column, values)
        self.check(np.bincount(codes))
        rows = shuffled(len(dataset), seed)
        partitioner = self.partitioner(seeds.derive(seed, "partition", "draw"))
        partitioner.dataset = Dataset.from_dict({"row": rows, LABEL: codes[rows]}).with_format("arrow")
        with columns.quiet(), warnings.catch_warnings():
            # It warns of repeated draws and of unused classes in terms of options that do not exist here (see report),
            # and Arrow of how it is called.
            warnings.simplefilter("ignore")
            try:
                dealt = [partitioner.load_partition(client)[:]["row"].to_numpy() for client in range(clients)]
            except ValueError as error:
                raise DataError(f"partition {self.id!r}: {self.advice(len(dataset))}") from error
        order, sizes = np.concatenate(dealt), np.array([len(part) for part in dealt])
        self.report(np.bincount(codes[order], minlength=len(names)), names)
        return Assignment.of(Numbered.first(clients), order, sizes)

    @abstractmethod
    def partitioner(self, seed: int) -> Partitioner:
        """Flower's partitioner of these settings."""

    @abstractmethod
    def advice(self, rows: int) -> str:
        """What to say when chance makes these settings impossible."""

    def check(self, count: np.ndarray) -> None:
        """Raise ``DataError`` unless the settings fit classes of these sizes, ``[K]``."""

    def report(self, used: np.ndarray, names: list[str]) -> None:
        """Say what is lost; rows dealt of each class ``[K]``."""


@dataclass(frozen=True)
class Dirichlet(ByLabel):
    """For each class, the clients' shares of its rows are drawn: p ~ Dir(alpha, ..., alpha) (arXiv:1905.12022).

    Args:
        num_clients: clients, C.
        alpha: concentration; 0.1 gives clients with few classes each, 100 nearly equal ones.
        column: of the classes.
        min_partition_size: rows; the shares are drawn again, ten times at most, until each client has as many.
    """

    id: ClassVar[str] = "dirichlet"

    num_clients: int
    alpha: float
    column: str = "label"
    min_partition_size: int = 1

    def __post_init__(self) -> None:
        at_least(self, "num_clients", 1)
        at_least(self, "min_partition_size", 0)
        if not 0 < self.alpha < math.inf:
            raise RecipeError(f"partition 'dirichlet': alpha must be above 0 and finite, but is {self.alpha}.")

    def assign(self, dataset: Dataset, seed: int) -> Assignment:
        return self.deal(dataset, seed, self.num_clients, self.column)

    def partitioner(self, seed: int) -> Partitioner:
        return DirichletPartitioner(
            num_partitions=self.num_clients,
            partition_by=LABEL,
            alpha=float(self.alpha),
            min_partition_size=self.min_partition_size,
            shuffle=False,
            seed=seed,
        )

    def advice(self, rows: int) -> str:
        return (
            f"11 draws left a client with fewer rows than min_partition_size, which is {self.min_partition_size}. Use "
            f"more data than {rows} rows, raise alpha ({self.alpha:g}), or lower num_clients ({self.num_clients}) or "
            "min_partition_size."
        )


@dataclass(frozen=True)
class Pathological(ByLabel):
    """Each client has rows of exactly ``classes_per_client`` classes, drawn by chance (arXiv:2102.02079).

    The rows of a class are dealt evenly to the clients that have it. A class that no client draws is left out, with a
    warning that names it.

    Args:
        num_clients: clients, C.
        classes_per_client: classes of each client.
        column: of the classes.
    """

    id: ClassVar[str] = "pathological"

    num_clients: int
    classes_per_client: int
    column: str = "label"

    def __post_init__(self) -> None:
        at_least(self, "num_clients", 1)
        at_least(self, "classes_per_client", 1)

    def assign(self, dataset: Dataset, seed: int) -> Assignment:
        return self.deal(dataset, seed, self.num_clients, self.column)

    def partitioner(self, seed: int) -> Partitioner:
        return PathologicalPartitioner(
            num_partitions=self.num_clients,
            partition_by=LABEL,
            num_classes_per_partition=self.classes_per_client,
            shuffle=False,
            seed=seed,
        )

    def check(self, count: np.ndarray) -> None:
        if self.classes_per_client > len(count):
            raise DataError(
                f"partition 'pathological': classes_per_client must be at most the number of classes in "
                f"{self.column!r}, {len(count)}, but is {self.classes_per_client}. Lower it."
            )

    def advice(self, rows: int) -> str:
        return (
            f"more clients drew a class of {self.column!r} than it has rows. Lower num_clients ({self.num_clients}) or "
            f"classes_per_client ({self.classes_per_client}), or use more data than {rows} rows."
        )

    def report(self, used: np.ndarray, names: list[str]) -> None:
        if (lost := np.flatnonzero(used == 0)).size:
            some = ", ".join(repr(names[k]) for k in lost[:10]) + (", ..." if lost.size > 10 else "")
            warnings.warn(
                f"partition 'pathological': no client drew {lost.size} of {len(names)} classes ({some}); their rows "
                "are not used. Raise num_clients or classes_per_client to use all.",
                stacklevel=5,
            )


@dataclass(frozen=True)
class Shards(ByLabel):
    """Rows sorted by a column, cut into equal shards, and a few shards dealt to each client (arXiv:1602.05629).

    A shard has floor(N / (C ``shards_per_client``)) rows; the rows of the shards that are left over are not used.

    Args:
        num_clients: clients, C.
        shards_per_client: shards of each client.
        column: by which the rows are sorted.
    """

    id: ClassVar[str] = "shards"

    num_clients: int
    shards_per_client: int
    column: str = "label"

    def __post_init__(self) -> None:
        at_least(self, "num_clients", 1)
        at_least(self, "shards_per_client", 1)

    def assign(self, dataset: Dataset, seed: int) -> Assignment:
        return self.deal(dataset, seed, self.num_clients, self.column)

    def partitioner(self, seed: int) -> Partitioner:
        return ShardPartitioner(
            num_partitions=self.num_clients,
            partition_by=LABEL,
            num_shards_per_partition=self.shards_per_client,
            shuffle=False,
            seed=seed,
        )

    def check(self, count: np.ndarray) -> None:
        if (wanted := self.num_clients * self.shards_per_client) > count.sum():
            raise DataError(
                f"partition 'shards': num_clients * shards_per_client must be at most the number of rows, "
                f"{count.sum()}, but is {wanted}. Lower one of them."
            )

    def advice(self, rows: int) -> str:
        return (
            f"{rows} rows cannot be cut into {self.num_clients} * {self.shards_per_client} shards. Lower num_clients "
            "or shards_per_client."
        )
