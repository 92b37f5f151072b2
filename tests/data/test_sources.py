from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import Dataset

from fedfm import parts
from fedfm.data import Digits, File, Hub
from fedfm.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No cache outside the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


ROWS = [{"text": "good film", "label": "pos"}, {"text": "bad film", "label": "neg"}, {"text": "fine", "label": "pos"}]


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    """The path of a file with these rows, in the form that its extension says."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        sep = "," if path.suffix == ".csv" else "\t"
        path.write_text(
            "".join(sep.join(str(v) for v in r) + "\n" for r in [rows[0].keys(), *(r.values() for r in rows)])
        )
    return str(path)


@pytest.mark.parametrize("extension", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_files_of_every_sort_give_the_same_rows(tmp_path: Path, extension: str) -> None:
    rows = File(written(tmp_path / f"a.{extension}", ROWS)).load()
    assert list(rows["text"]) == ["good film", "bad film", "fine"]
    assert rows.features["label"].names == ["neg", "pos"]
    assert list(rows["label"]) == [1, 0, 1]


def test_a_pattern_reads_all_files_in_order(tmp_path: Path) -> None:
    written(tmp_path / "b.jsonl", [{"text": "second"}])
    written(tmp_path / "a.jsonl", [{"text": "first"}])
    assert list(File(str(tmp_path / "*.jsonl")).load()["text"]) == ["first", "second"]


def test_columns_are_renamed_and_joined_and_labels_from_one_are_remapped(tmp_path: Path) -> None:
    rows = [
        {"class": 1, "title": "T1", "text": "B1", "day": "mon"},
        {"class": 4, "title": "T2", "text": "B2", "day": "tue"},
        {"class": 2, "title": "T3", "text": "B3", "day": "wed"},
    ]
    loaded = File(written(tmp_path / "n.jsonl", rows), {"label": "class", "text": ["title", "text"]}).load()
    assert list(loaded["text"]) == ["T1\nB1", "T2\nB2", "T3\nB3"]
    assert list(loaded["label"]) == [0, 2, 1]
    assert loaded.features["label"].names == ["1", "2", "4"]
    assert list(loaded["day"]) == ["mon", "tue", "wed"]
    assert set(loaded.column_names) == {"text", "label", "day"}


def test_a_file_without_a_header_takes_names(tmp_path: Path) -> None:
    (tmp_path / "n.csv").write_text("1,hello\n0,NA\n")
    rows = File(str(tmp_path / "n.csv"), names=("label", "text")).load()
    assert list(rows["text"]) == ["hello", "NA"]
    assert list(rows["label"]) == [1, 0]


def test_a_wrong_column_names_itself_the_columns_and_the_nearest(tmp_path: Path) -> None:
    path = written(tmp_path / "n.jsonl", [{"body": "x", "category": 1}])
    with pytest.raises(DataError, match=r"needs a column 'categry'.* Did you mean 'category'\? It has body, category"):
        File(path, {"text": "body", "label": "categry"}).load()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "x.md",
            "hello",
            r"extension '.md', which is not known. Known are .jsonl, .json, .csv, .tsv, .parquet: convert",
        ),
        ("x.parquet", "no parquet at all", r"cannot be read as PARQUET: .* Mend the file, or give it the extension"),
        ("x.jsonl", '{"text": "a"}\n{"text": ', r"cannot be read as JSON: .* Mend the file"),
        ("x.csv", "", r"cannot be read as CSV: .* Mend the file"),
        ("x.csv", "text,label\n", r"cannot be read as CSV: .* Mend the file"),
        ("x.jsonl", "", r"holds no rows. Give a file or a split with at least one row"),
        (
            "x.csv",
            "text,label\nx,1\ny,\n",
            r"the label needs a value of 'label' in each row, but 1 of 2 rows have none",
        ),
        (
            "x.csv",
            "a,b\n1,2\n",
            r"has the columns a, b, which is no known shape. Known are messages; conversations; pr",
        ),
    ],
)
def test_what_cannot_be_read_is_one_line_that_says_what_to_do(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        File(str(tmp_path / name)).load()
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    written(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(DataError, match=r"there is no file '.*trian.jsonl'. Did you mean 'train.jsonl'\?"):
        File(str(tmp_path / "trian.jsonl")).load()
    with pytest.raises(DataError, match="there is no file"):
        File(str(tmp_path / "nowhere" / "*.csv")).load()


def test_files_of_different_sorts_are_refused(tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl", ROWS)
    written(tmp_path / "a.csv", ROWS)
    with pytest.raises(DataError, match="must be of one sort, but are csv, json"):
        File(str(tmp_path / "a.*")).load()


def test_digits_are_between_zero_and_one() -> None:
    rows = Digits().load().with_format("numpy")[:]
    assert rows["pixels"].shape == (1797, 64)
    assert rows["pixels"].min() == 0
    assert rows["pixels"].max() == 1
    assert np.bincount(rows["label"]).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert Digits().load().features["label"].names == [str(d) for d in range(10)]


def test_the_hub_gets_what_the_recipe_says(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(path: str, name: str | None, **options: Any) -> Dataset:
        asked.append((path, name, options))
        return Dataset.from_list([{"sentence": "x"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(Hub("org/set", columns={"text": "sentence"}).load()["text"]) == ["x"]
    Hub("org/set", "en", "test", {"text": "sentence"}, "v1").load()
    assert asked == [
        ("org/set", None, {"split": "train", "revision": None}),
        ("org/set", "en", {"split": "test", "revision": "v1"}),
    ]


def test_a_data_set_that_cannot_be_had_says_why_on_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Dataset:
        raise ConnectionError("Couldn't reach it\nand a long story")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match=r"'org/set'.* cannot be loaded: Couldn't reach it. HF_HUB_OFFLINE is set: unset"
    ) as e:
        Hub("org/set").load()
    assert "\n" not in str(e.value)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with pytest.raises(DataError, match="Check the id, name, split and the connection"):
        Hub("org/set").load()


def test_a_recipe_can_spell_every_source_and_get_it_back() -> None:
    spec = {"kind": "file", "path": "x.csv", "columns": {"text": ["a", "b"], "label": "c"}}
    made = parts.make("data", spec, "data.source")
    assert made.columns == {"text": ["a", "b"], "label": "c"}
    assert parts.make("data", parts.describe(made), "data.source") == made
    assert parts.make("data", "chatterbot", "data.source").languages == ("english",)
    assert isinstance(parts.make("data", "digits", "data.source"), Digits)
    assert parts.make("data", {"kind": "hub", "path": "a/b"}, "data.source") == Hub("a/b")
