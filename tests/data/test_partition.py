"""Partitions: by hand, against flwr_datasets, and what they refuse."""

from __future__ import annotations

import warnings
from typing import Any

import flwr_datasets.partitioner as flwr
import numpy as np
import pytest
from datasets import ClassLabel, Dataset

from fedfm.core import seeds
from fedfm.data import Assignment, Dirichlet, Iid, Natural, Pathological, Shards, SizeSkew
from fedfm.data.names import Numbered
from fedfm.data.partition import Partition, shuffled
from fedfm.errors import DataError, RecipeError

ROWS, SEED = 203, 7
DRAW = seeds.derive(SEED, "partition", "draw")


def table(rows: int = ROWS) -> Dataset:
    """Four classes of unequal size, and five writers."""
    label = np.random.default_rng(0).choice(4, size=rows, p=[0.1, 0.2, 0.3, 0.4])
    return Dataset.from_dict({"row": range(rows), "label": label, "writer": [f"w{i * i % 5}" for i in range(rows)]})


def owned(assigned: Assignment) -> list[list[int]]:
    return [assigned.rows(i).tolist() for i in range(len(assigned.ids))]


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (Iid(10), flwr.IidPartitioner(10)),
        (SizeSkew(7, "linear"), flwr.LinearPartitioner(7)),
        (SizeSkew(5, "square"), flwr.SquarePartitioner(5)),
        (SizeSkew(4, "exponential"), flwr.ExponentialPartitioner(4)),
        (Dirichlet(6, 0.5), flwr.DirichletPartitioner(6, "label", 0.5, 1, shuffle=False, seed=DRAW)),
        (Dirichlet(3, 0.3, min_partition_size=40), flwr.DirichletPartitioner(3, "label", 0.3, 40, False, False, DRAW)),
        (Pathological(9, 2), flwr.PathologicalPartitioner(9, "label", 2, shuffle=False, seed=DRAW)),
        (Shards(6, 3), flwr.ShardPartitioner(6, "label", 3, shuffle=False, seed=DRAW)),
    ],
)
def test_the_same_rows_as_flower_deals(mine: Partition, theirs: flwr.Partitioner) -> None:
    data = table()
    theirs.dataset = data.select(shuffled(ROWS, SEED))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Flower warns when it draws again
        expected = [theirs.load_partition(i)["row"][:] for i in range(theirs.num_partitions)]
    if isinstance(mine, Dirichlet | Pathological):  # order within a client has no meaning there
        expected = [sorted(rows) for rows in expected]
        assert [sorted(rows) for rows in owned(mine.assign(data, SEED))] == expected
    else:
        assert owned(mine.assign(data, SEED)) == expected


def test_natural_deals_as_flower_does() -> None:
    theirs = flwr.NaturalIdPartitioner("writer")
    theirs.dataset = table()
    assigned = Natural("writer").assign(table(), SEED)
    assert list(assigned.ids) == [theirs.partition_id_to_natural_id[i] for i in range(theirs.num_partitions)]
    assert owned(assigned) == [theirs.load_partition(i)["row"][:] for i in range(theirs.num_partitions)]


ALL = [Iid(9), SizeSkew(6), Dirichlet(8, 0.5), Pathological(9, 2), Shards(6, 3), Natural("writer")]


@pytest.mark.parametrize("partition", ALL, ids=lambda p: p.id)
def test_no_row_has_two_owners_and_the_seed_decides(partition: Partition) -> None:
    data = table()
    assigned = partition.assign(data, SEED)
    assert len(set(assigned.order.tolist())) == len(assigned.order) == assigned.offsets[-1]
    assert assigned.order.dtype == assigned.offsets.dtype == np.int64
    assert owned(partition.assign(data, SEED)) == owned(assigned)
    if partition.id != "natural":
        assert owned(partition.assign(data, SEED + 1)) != owned(assigned)
    if partition.id not in ("shards", "pathological"):  # those may leave rows over
        assert len(assigned.order) == ROWS


def test_iid_by_hand() -> None:
    assigned = Iid(3).assign(table(8), 0)
    assert assigned.sizes.tolist() == [3, 3, 2]  # 8 = 3 * 2 + 2: the first two have one more
    assert list(assigned.ids) == ["client-00000", "client-00001", "client-00002"]
    assert assigned.order.tolist() != list(range(8))  # the rows are shuffled first


@pytest.mark.parametrize(
    ("skew", "sizes"),
    [
        ("linear", [10, 20, 30, 43]),  # 103 * i / 10 = 10.3, 20.6, 30.9, 41.2; the last one has the rest
        ("square", [3, 13, 30, 57]),  # 103 * i^2 / 30 = 3.4, 13.7, 30.9, 54.9
        ("exponential", [3, 8, 24, 68]),  # 103 * e^i / 84.8 = 3.3, 8.97, 24.4, 66.3
    ],
)
def test_size_skew_by_hand(skew: Any, sizes: list[int]) -> None:
    assert SizeSkew(4, skew).assign(table(103), 0).sizes.tolist() == sizes


def test_exponential_skew_of_many_clients_stays_finite() -> None:
    sizes = SizeSkew(2000, "exponential").assign(table(), 0).sizes
    assert sizes.sum() == ROWS
    # 203 (1 - 1/e) e^-k = 128.3, 47.2, 17.4, 6.4, 2.3 and 0.9 rows: 200 without the fractions, and the last has 3 more
    assert sizes[-6:].tolist() == [0, 2, 6, 17, 47, 131]
    assert not sizes[:-5].any()


def test_pathological_clients_have_as_many_classes_as_asked() -> None:
    data = table()
    label = np.array(data["label"][:])
    assert {len(set(label[rows])) for rows in owned(Pathological(9, 2).assign(data, 1))} == {2}


def test_a_class_that_nobody_draws_is_named() -> None:
    with pytest.warns(UserWarning, match=r"no client drew 3 of 4 classes \(.*\); their rows are not used"):
        assigned = Pathological(1, 1).assign(table(), 1)
    assert len(set(np.array(table()["label"][:])[assigned.order])) == 1


def test_shards_leave_over_what_does_not_fill_one() -> None:
    assigned = Shards(4, 5).assign(table(), 0)  # 203 // 20 = 10 rows a shard
    assert assigned.sizes.tolist() == [50] * 4


def test_dirichlet_shares_are_skewed_by_alpha() -> None:
    data = table(2000)
    label = np.array(data["label"][:])

    def strongest(alpha: float) -> float:
        rows = owned(Dirichlet(5, alpha).assign(data, 3))
        return float(np.mean([np.bincount(label[r], minlength=4).max() / len(r) for r in rows]))

    assert strongest(100) < 0.45 < 0.6 < strongest(0.1)  # 0.4 is the share of the largest class


def test_natural_numbers_stay_in_their_order_and_classes_have_their_names() -> None:
    data = Dataset.from_dict({"who": [10, 2, 10, 1]})
    assigned = Natural("who").assign(data, 0)
    assert list(assigned.ids) == ["1", "2", "10"]
    assert owned(assigned) == [[3], [1], [0, 2]]
    assert [assigned.ids.index(i) for i in ("10", "1", "2")] == [2, 0, 1]
    named = Dataset.from_dict({"c": [1, 0, 1]}).cast_column("c", ClassLabel(names=["sea", "air"]))
    assert list(Natural("c").assign(named, 0).ids) == ["sea", "air"]


def test_a_view_is_dealt_by_its_own_rows() -> None:
    view = table().select([5, 1, 6])  # writers 25 % 5 = 0, 1, 36 % 5 = 1
    assert owned(Natural("writer").assign(view, 0)) == [[0], [1, 2]]


def test_a_hundred_thousand_clients_are_three_flat_arrays() -> None:
    data = Dataset.from_dict({"row": np.arange(200_000)})
    assigned = Iid(100_000).assign(data, 0)
    assert isinstance(assigned.ids, Numbered)
    assert isinstance(assigned.ids.numbers, range)  # no name exists until it is looked at
    assert assigned.order.nbytes == 8 * 200_000
    assert assigned.offsets.nbytes == 8 * 100_001
    assert assigned.ids[99_999] == "client-99999"


def test_capped_keeps_some_rows_in_their_order() -> None:
    assigned = Natural("writer").assign(table(), 0)
    capped = assigned.capped(20, seed=1)
    assert capped.sizes.tolist() == np.minimum(assigned.sizes, 20).tolist()
    for few, many in zip(owned(capped), owned(assigned), strict=True):
        assert few == sorted(few)
        assert set(few) <= set(many)
    assert owned(capped) == owned(assigned.capped(20, seed=1)) != owned(assigned.capped(20, seed=2))
    assert owned(capped)[0] != owned(assigned)[0][:20]  # drawn, not cut off


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Iid(0), "partition 'iid': num_clients must be at least 1, but is 0."),
        (lambda: Dirichlet(3, 0), "partition 'dirichlet': alpha must be above 0 and finite, but is 0."),
        (lambda: Dirichlet(3, 1, min_partition_size=-1), "min_partition_size must be at least 0, but is -1"),
        (lambda: Pathological(3, 0), "classes_per_client must be at least 1, but is 0"),
        (lambda: Shards(3, 0), "shards_per_client must be at least 1, but is 0"),
        (lambda: SizeSkew(3, "cubic"), "skew must be linear, square or exponential, but is 'cubic'"),  # type: ignore[arg-type]
    ],
)
def test_settings_that_cannot_be(make: Any, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        make()
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("partition", "message"),
    [
        (Iid(999), "partition 'iid': num_clients must be at most the number of rows, 203, but is 999."),
        (
            Dirichlet(50, 0.01, min_partition_size=4),
            "Use more data than 203 rows, raise alpha (0.01), or lower num_clients",
        ),
        (Pathological(3, 5), "at most the number of classes in 'label', 4, but is 5"),
        (Pathological(150, 2), "more clients drew a class of 'label' than it has rows. Lower num_clients (150)"),
        (Shards(50, 9), "at most the number of rows, 203, but is 450. Lower one of them."),
        (Natural("writr"), "needs a column 'writr', which the data does not have. Did you mean 'writer'?"),
        (Dirichlet(2, 1, column="lable"), "Did you mean 'label'? It has label, row, writer."),
    ],
)
def test_data_that_do_not_suffice(partition: Partition, message: str) -> None:
    with pytest.raises(DataError) as error:
        partition.assign(table(), 0)
    assert message in str(error.value)


def test_values_that_cannot_be_clients() -> None:
    with pytest.raises(DataError, match="2 of 3 rows have none, the first is row 1"):
        Natural("who").assign(Dataset.from_dict({"who": ["a", None, None]}), 0)
    with pytest.raises(DataError, match=r"column of single values.*Choose another column"):
        Natural("who").assign(Dataset.from_dict({"who": [["a"], ["b"]]}), 0)
