from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset

from fedfm.data import Splits, from_rows
from fedfm.errors import DataError, RecipeError

SPLITS = ("train", "validation", "test")


def counts(groups: list[int], splits: Splits = Splits(), client: str = "ann") -> list[int]:  # noqa: B008 - frozen
    return np.bincount(splits.divide(np.array(groups), 0, client), minlength=3).tolist()


@pytest.mark.parametrize(
    ("groups", "train_validation_test"),
    [(1, [1, 0, 0]), (2, [1, 0, 1]), (3, [1, 1, 1]), (5, [3, 1, 1]), (10, [7, 1, 2]), (100, [70, 10, 20])],
)
def test_few_groups_go_to_train_first_then_test_then_validation(groups: int, train_validation_test: list[int]) -> None:
    assert counts(list(range(groups))) == train_validation_test


def test_a_split_that_is_not_wanted_stays_empty() -> None:
    assert counts(list(range(10)), Splits(0, 0)) == [10, 0, 0]
    assert counts(list(range(10)), Splits(0, 0.3)) == [7, 0, 3]
    assert counts(list(range(10)), Splits(0.3, 0)) == [7, 3, 0]
    assert counts([0, 1], Splits(0.3, 0)) == [1, 1, 0]


def test_groups_are_never_cut_and_every_client_trains() -> None:
    draw = np.random.default_rng(0)
    for n in range(1, 60):
        for fractions in ((0.1, 0.2), (0.5, 0.49), (0, 0.9)):
            groups = draw.integers(0, draw.integers(1, n + 1), n)
            groups = np.unique(groups, return_inverse=True)[1]
            parts = Splits(*fractions).divide(groups, 3, f"client {n}")
            assert (parts == 0).any()
            for group in range(groups.max() + 1):
                assert len(set(parts[groups == group])) == 1


def test_a_big_group_does_not_fill_a_small_split() -> None:
    # One group of 90 and ten of one: 20 and 10 rows are wanted, which the small ones can give.
    train, _, _ = counts([0] * 90 + list(range(1, 11)))
    assert train >= 90


def test_the_split_depends_on_seed_and_client_only() -> None:
    groups = np.arange(50)
    a = Splits().divide(groups, 1, "ann")
    assert (a == Splits().divide(groups, 1, "ann")).all()
    assert (a != Splits().divide(groups, 2, "ann")).any()
    assert (a != Splits().divide(groups, 1, "bob")).any()


def test_rows_with_one_prompt_stay_together() -> None:
    rows = [{"question": f"Question {i % 7}?", "answer": str(i)} for i in range(70)]
    people = from_rows({"ann": rows})
    seen = [{r["messages"][0]["content"] for r in people.rows("ann", s)} for s in SPLITS]
    assert all(seen)
    assert not seen[0] & seen[1] | seen[0] & seen[2] | seen[1] & seen[2]


def test_prompts_that_differ_in_case_spacing_or_closing_marks_are_one() -> None:
    group = Splits().groups({"text": ["What is AI?", "what  is ai", "What is AI now?", "???", "!"]}, 5)
    assert group.tolist() == [0, 0, 1, 2, 3]


def test_rows_can_be_grouped_by_a_column_or_not_at_all() -> None:
    rows = [{"text": "same", "patient": i // 5} for i in range(50)]
    by_prompt = from_rows({"ann": rows})
    assert len(by_prompt.rows("ann", "train")) == 50
    alone = from_rows({"ann": rows}, Splits(group_by=""))
    assert [len(alone.rows("ann", s)) for s in SPLITS] == [35, 5, 10]
    patients = from_rows({"ann": rows}, Splits(group_by="patient"))
    seen = [set(patients.rows("ann", s)["patient"]) for s in SPLITS]
    assert [len(s) for s in seen] == [7, 1, 2]
    assert len(set.union(*seen)) == 10


def test_an_unknown_column_is_refused() -> None:
    with pytest.raises(DataError, match=r"splits.group_by needs a column 'patint'.*Did you mean 'patient'\?"):
        from_rows({"ann": [{"text": "x", "patient": 1}]}, Splits(group_by="patint"))


def test_rows_without_a_prompt_stand_alone() -> None:
    rows = Dataset.from_dict({"pixels": [[0.0]] * 4, "label": [0, 1, 0, 1]})
    assert Splits().columns(rows) == []
    assert Splits().groups({}, 4).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ((-0.1, 0.2), r"splits.validation must be from 0 to below 1, but is -0.1"),
        ((0.1, 1.0), r"splits.test must be from 0 to below 1, but is 1.0"),
        ((0.5, 0.5), r"splits.validation \+ splits.test must be below 1, but is 1: nothing would be left to train on"),
        ((float("nan"), 0.5), r"splits.validation must be from 0"),
    ],
)
def test_fractions_that_cannot_be_are_refused(fractions: tuple[float, float], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Splits(*fractions)
