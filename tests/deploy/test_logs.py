"""Logs as one JSON object a line."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedfm.deploy import logs


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The logger as it was."""
    before = logs.log.handlers[:], logs.log.level, logs.log.propagate
    yield
    logs.log.handlers[:], logs.log.propagate = before[0], before[2]
    logs.log.setLevel(before[1])


def test_rounds_and_drops_with_their_ids() -> None:
    said = io.StringIO()
    logs.begin(said)
    watching = logs.RoundLog("ab")
    dropped = [{"client": "bob", "reason": "late"}]
    watching.round_finished(
        {"round": 2, "seconds": 1.5, "train_loss": 0.5, "bytes_up": 7, "participants": {"ann": {}}, "dropped": dropped}
    )
    watching.finished("completed")
    lines = [json.loads(line) for line in said.getvalue().splitlines()]
    assert [(line["level"], line["message"], line["run"]) for line in lines] == [
        ("info", "round finished", "ab"),
        ("warning", "dropped", "ab"),
        ("info", "run ended", "ab"),
    ]
    assert (lines[0]["round"], lines[0]["sites"], lines[0]["bytes_up"]) == (2, ["ann"], 7)
    assert (lines[1]["round"], lines[1]["site"], lines[1]["reason"]) == (2, "bob", "late")
    assert lines[2]["status"] == "completed"


def test_a_traceback_is_one_line_and_a_file_goes_on(tmp_path: Path) -> None:
    place = tmp_path / "log.jsonl"
    for _ in range(2):
        logs.begin(place)
        try:
            raise ValueError("two\nlines")
        except ValueError:
            logging.getLogger("fedfm").exception("not answered", extra={"about": {"site": "ann"}})
    lines = [json.loads(line) for line in place.read_text().splitlines()]
    assert len(lines) == 2
    assert lines[0]["site"] == "ann"
    assert "ValueError: two\nlines" in lines[0]["error"]
