"""The benchmarks of many clients and of a card: each part runs in the small, goals and operations are counted right."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_from_disk

from benchmarks.speed import crowd, gpu, scale
from benchmarks.speed.flops import flops
from fedfm import LoRA
from fedfm.train.bench import Bench

SMALL: dict[str, list[dict[str, Any]]] = {
    "registered": [{"clients": 12, "partition": kind, "visited": 5} for kind in ("iid", "natural")],
    "round": [{"clients": 4, "population": 12}],
    "cohort": [{"clients": 3, "engine": engine, "width": 16, "blocks": 1} for engine in crowd.ENGINES],
    "private": [{"clients": 3, "method": method, "width": 16} for method in crowd.METHODS],
}


@pytest.mark.parametrize(("part", "setting"), [(part, one) for part, asked in SMALL.items() for one in asked])
def test_each_part_runs(part: str, setting: dict[str, Any], tmp_path: Path) -> None:
    rows = {"rows": str(crowd.rows_of(12, tmp_path))} if part in ("registered", "round") else {}
    found = crowd.PARTS[part](**setting, **rows)
    assert all(math.isfinite(value) for value in found.values())
    if part == "cohort":
        # One block of width 16 with factors of rank 16: 4 x 16 x 16 numbers of 4 bytes.
        assert found["update_mb"] == 4 * 4 * 16**2 / 1e6
    if part == "private":
        assert found["files"] == (3 if setting["method"] == "fedsa-lora" else 0)


def test_what_is_measured_is_what_the_parts_take(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(scale, "rows_of", lambda clients, folder: folder / str(clients))
    for part, asked in scale.settings(tmp_path).items():
        names = {name for one in SMALL[part] for name in one} | ({"rows"} if part in ("registered", "round") else set())
        assert all(one.keys() == names for one in asked)


def test_rows_of_a_client_lie_apart(tmp_path: Path) -> None:
    rows = load_from_disk(str(crowd.rows_of(4, tmp_path)))
    assert len(rows) == 4 * crowd.ROWS
    assert rows["owner"][:5] == ["phone-0000000", "phone-0000001", "phone-0000002", "phone-0000003", "phone-0000000"]


def test_readings_come_from_processes_of_their_own() -> None:
    found = scale.measured("cohort", SMALL["cohort"][:1], repeats=1)
    assert found[0]["clients"] == 3
    assert found[0]["update_mb"] == 4 * 4 * 16**2 / 1e6


def test_the_middle_reading_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    said = iter([{"s": 1.0}, {"s": 10.0}, {"s": 3.0}, {"s": 30.0}, {"s": 2.0}, {"s": 20.0}])
    monkeypatch.setattr(scale, "fresh", lambda part, setting: next(said))
    asked = [{"clients": 1, "rows": "/a/place"}, {"clients": 2, "rows": "/a/place"}]
    assert scale.measured("round", asked, repeats=3) == [{"clients": 1, "s": 2.0}, {"clients": 2, "s": 20.0}]


def test_goals_are_counted_right() -> None:
    registered = [
        {"clients": n, "partition": kind, "built_used_mb": mb}
        for kind, pairs in (("iid", ((1_000, 10.0), (1_001_000, 110.0))), ("natural", ((1_000, 10.0), (2_000, 12.0))))
        for n, mb in pairs
    ]
    cohort = [
        {"clients": n, "engine": engine, "update_mb": 10.0, "peak_mb": mb}
        for engine, pairs in (("one by one", ((10, 20.0), (1_000, 22.0))), ("fused", ((10, 90.0), (1_000, 110.0))))
        for n, mb in pairs
    ]
    private = [
        {"clients": n, "method": method, "kept_mb": kept, "visited_used_mb": mb}
        for method, readings in (
            ("fedit", ((10, 0.0, 5.0), (100, 0.0, 8.0))),
            ("fedsa-lora", ((10, 20.0, 6.0), (100, 220.0, 11.0))),
        )
        for n, kept, mb in readings
    ]
    found = list(scale.goals({"registered": registered, "cohort": cohort, "private": private}))
    # 100 MB for a million clients; 2 MB for a thousand; 2 MB and 20 MB of updates of 10 MB; 5 - 3 of 200 MB.
    assert [one["value"] for one in found] == pytest.approx([100, 2000, 0.2, 2.0, 1.0])
    assert [one["met"] for one in found] == [True, False, True, False, True]
    assert list(scale.goals({})) == []


def test_operations_by_hand() -> None:
    bench = Bench.of(crowd.drawn(), LoRA(r=8, target_modules=("q_proj", "v_proj")), 0)
    words = len(bench.loaded.tokenizer)
    # One block of width 16: 4 + 3 frozen matrices of 16 x 16; 2 x 2 factors of 8 x 16; a head of words x 16.
    by_hand = 4 * 7 * 256 * 10 + 4 * words * 16 * 9 + 6 * 4 * 128 * 10 + 12 * 16 * 10**2
    assert flops(bench, 10) == by_hand


def test_both_trainers_run_without_a_card(capsys: pytest.CaptureFixture[str]) -> None:
    setting = gpu.Setting("cpu", clients=(2, 3), pairs=1, small=True)
    found = gpu.measured(setting)
    assert [one["clients"] for one in found["rows"]] == [2, 3]
    for one in found["rows"]:
        # Each of the 8 texts of a client is used once in 4 steps of 2.
        assert 24 * 8 * one["clients"] * 0.5 < one["tokens"] < 64 * 8 * one["clients"] * 1.5
        assert one["sequential"]["seconds"] > 0
        assert one["fused"]["waits_a_step"] is None
    assert gpu.main(["--device", "cpu", "--small", "--clients", "2", "--pairs", "1"]) == 0
    assert "TFLOP/s" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_the_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    assert "there is no CUDA card here" in capsys.readouterr().err
