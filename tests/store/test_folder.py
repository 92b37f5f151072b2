"""The folder of a run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fedfm.core.method import State
from fedfm.errors import StoreError
from fedfm.store.folder import RunFolder


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., RunFolder]]:
    """Opens run folders and closes them after the test."""
    folders: list[RunFolder] = []

    def open_(**how: Any) -> RunFolder:
        folders.append(RunFolder(tmp_path / "run", **how))
        return folders[-1]

    yield open_
    for folder in folders:
        folder.close()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def earlier_run(path: Path) -> None:
    path.mkdir()
    (path / "recipe.yaml").write_text("rounds: 3\n")
    (path / "metrics.jsonl").write_text('{"round": 1}\n')
    (path / "checkpoints" / "round-00000001").mkdir(parents=True)


def test_a_new_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "a" / "b"))
    assert folder.path == tmp_path / "a" / "b"
    assert folder.path.is_dir()
    assert folder.final == folder.path / "final"
    assert folder.records() == []
    folder.close()


def test_records_are_lines_in_order(opened: Callable[..., RunFolder]) -> None:
    folder = opened()
    for round in range(3):
        folder.append({"round": round, "loss": 0.5 * round, "name": "größe\n"})
    assert folder.records() == [{"round": r, "loss": 0.5 * r, "name": "größe\n"} for r in range(3)]
    assert len((folder.path / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_record_that_is_not_json_is_refused_and_leaves_no_half_line(opened: Callable[..., RunFolder]) -> None:
    folder = opened()
    folder.append({"round": 0})
    with pytest.raises(ValueError, match="not JSON compliant"):
        folder.append({"round": 1, "loss": float("nan")})
    folder.append({"round": 2})
    assert folder.records() == [{"round": 0}, {"round": 2}]


def test_rewind_forgets_records_client_states_and_the_status(opened: Callable[..., RunFolder]) -> None:
    folder = opened()
    for round in range(4):
        folder.append({"round": round})
        folder.clients.put("ann", round, {"p": torch.tensor(float(round))})
    folder.finish("failed", "power")
    folder.rewind(2)
    assert folder.records() == [{"round": 0}, {"round": 1}, {"round": 2}]
    assert folder.clients.get("ann")["p"].item() == 2.0
    assert not (folder.path / "status.json").exists()
    folder.append({"round": 3, "again": True})
    assert folder.records()[-1] == {"round": 3, "again": True}


@pytest.mark.parametrize("torn", ['{"rou', '{"round": 2}', '{"round": 2, "loss": 0.1'])
def test_a_torn_last_line_is_not_read_and_rewind_removes_it(opened: Callable[..., RunFolder], torn: str) -> None:
    folder = opened()
    for round in range(2):
        folder.append({"round": round})
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write(torn)  # killed before the line's end
    assert folder.records() == [{"round": 0}, {"round": 1}]
    folder.rewind(5)
    folder.append({"round": 2, "whole": True})
    assert folder.records() == [{"round": 0}, {"round": 1}, {"round": 2, "whole": True}]


@pytest.mark.parametrize("damage", ['{"round": 0}\n{"ro{"round": 1}\n', "\0\0\0\n", '{"round": 0}\n\n{"round": 1}\n'])
def test_a_damaged_whole_line_says_which_file_and_what_to_do(opened: Callable[..., RunFolder], damage: str) -> None:
    folder = opened()
    path = folder.path / "metrics.jsonl"
    path.write_text(damage)
    for read in (folder.records, lambda: folder.rewind(0)):
        with pytest.raises(StoreError) as caught:
            read()
        assert str(caught.value).startswith(f"{path} is damaged: ")
        assert str(caught.value).endswith("Start a new run in another output_dir.")
    assert path.read_text() == damage


def test_rewind_of_a_run_without_records(opened: Callable[..., RunFolder]) -> None:
    folder = opened()
    folder.rewind(0)
    assert folder.records() == []


def test_finish_writes_what_became_of_the_run(opened: Callable[..., RunFolder]) -> None:
    folder = opened()
    for status, reason in (("failed", 'client "ann"\nfailed'), ("completed", "")):
        folder.finish(status, reason)
        assert json.loads((folder.path / "status.json").read_text()) == {"status": status, "reason": reason}
    assert names(folder.path) == ["status.json"]


def test_two_openings_at_once_are_refused(opened: Callable[..., RunFolder]) -> None:
    first = opened()
    for how in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(StoreError) as caught:
            opened(**how)
        assert str(caught.value) == (
            f"another process is writing {first.path}. Wait for it, or choose another output_dir."
        )
    first.close()
    assert opened(resume=True).records() == []


def test_another_process_is_refused_too(opened: Callable[..., RunFolder]) -> None:
    path = opened().path
    code = f"from fedfm.store import RunFolder; RunFolder({str(path)!r}, resume=True)"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert other.returncode != 0
    assert "another process is writing" in other.stderr


def test_an_earlier_run_is_neither_continued_nor_removed_unasked(
    opened: Callable[..., RunFolder], tmp_path: Path
) -> None:
    path = tmp_path / "run"
    earlier_run(path)
    for _ in range(2):  # the refusal holds no lock
        with pytest.raises(StoreError) as caught:
            opened()
        assert str(caught.value) == (
            f"{path} holds an earlier run. Go on with it by --resume, replace it by --overwrite, or choose another "
            "output_dir."
        )
    assert names(path) == ["checkpoints", "metrics.jsonl", "recipe.yaml"]
    assert opened(resume=True).records() == [{"round": 1}]


def test_overwrite_removes_the_earlier_run(opened: Callable[..., RunFolder], tmp_path: Path) -> None:
    earlier_run(tmp_path / "run")
    folder = opened(overwrite=True)
    assert names(folder.path) == []
    assert folder.records() == []
    assert folder.checkpoints.read(State) is None


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_other_files_is_never_touched(
    opened: Callable[..., RunFolder], tmp_path: Path, overwrite: bool
) -> None:
    path = tmp_path / "run"
    path.mkdir()
    (path / "thesis.tex").write_text("years of work")
    with pytest.raises(StoreError) as caught:
        opened(overwrite=overwrite)
    assert str(caught.value) == (
        f"{path} holds files that are not of a run, such as thesis.tex. Choose another output_dir."
    )
    assert (path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("overwrite", [False, True])
def test_one_foreign_file_beside_an_earlier_run_protects_both(
    opened: Callable[..., RunFolder], tmp_path: Path, overwrite: bool
) -> None:
    path = tmp_path / "run"
    earlier_run(path)
    (path / "notes").mkdir()
    (path / "notes" / "thesis.tex").write_text("years of work")
    for _ in range(2):  # the refusal holds no lock
        with pytest.raises(StoreError, match="holds files that are not of a run, such as notes"):
            opened(overwrite=overwrite)
    assert names(path) == ["checkpoints", "metrics.jsonl", "notes", "recipe.yaml"]
    assert (path / "notes" / "thesis.tex").read_text() == "years of work"


def test_a_recipe_alone_is_no_earlier_run(opened: Callable[..., RunFolder], tmp_path: Path) -> None:
    # A user may keep a recipe, or a model under final/, in the folder where the output is aimed at.
    path = tmp_path / "run"
    (path / "final").mkdir(parents=True)
    (path / "recipe.yaml").write_text("output_dir: .")
    with pytest.raises(StoreError, match="holds files that are not of a run, such as"):
        opened(overwrite=True)
    assert names(path) == ["final", "recipe.yaml"]


@pytest.mark.parametrize("mark", ["metrics.jsonl", "status.json", "data.json"])
def test_an_earlier_run_is_known_by_what_only_runs_write(
    opened: Callable[..., RunFolder], tmp_path: Path, mark: str
) -> None:
    path = tmp_path / "run"
    path.mkdir()
    (path / mark).write_text("")
    (path / "recipe.yaml").write_text("rounds: 3\n")
    with pytest.raises(StoreError, match="holds an earlier run"):
        opened()
    assert names(opened(overwrite=True).path) == []


def test_a_run_that_failed_before_its_first_round_can_be_replaced(opened: Callable[..., RunFolder]) -> None:
    first = opened()
    first.finish("failed", "no model")
    first.close()
    assert names(opened(overwrite=True).path) == []


def test_what_a_whole_run_leaves_can_be_replaced(opened: Callable[..., RunFolder]) -> None:
    own = ("checkpoints", "clients", "final", "references", "tensorboard")
    first = opened()
    for folder in own:
        (first.path / folder / "deep").mkdir(parents=True)
    for file in ("recipe.yaml", "data.json", "metrics.jsonl", "status.json", "results.json", "report.html"):
        (first.path / file).write_text("{}\n")
    first.close()
    assert names(opened(overwrite=True).path) == []


def test_an_empty_folder_and_one_with_only_a_lock_are_free(opened: Callable[..., RunFolder], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    opened().close()
    assert names(opened().path) == []


def test_resume_keeps_what_is_there(opened: Callable[..., RunFolder]) -> None:
    folder = opened()
    folder.append({"round": 1})
    folder.checkpoints.write(1, State({"w": torch.tensor([3.0])}), {"idle": 0})
    folder.clients.put("ann", 1, {"p": torch.tensor(4.0)})
    folder.close()
    again = opened(resume=True)
    assert again.records() == [{"round": 1}]
    found = again.checkpoints.read(State)
    assert found is not None
    assert (found[0], found[1].weights["w"].item(), found[2]) == (1, 3.0, {"idle": 0})
    assert again.clients.get("ann")["p"].item() == 4.0


def test_a_place_that_cannot_be_written_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match=r"cannot write .*Free space or mend the permissions.*another output_dir"):
        RunFolder(tmp_path / "file" / "run")
