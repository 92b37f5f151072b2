"""Exact retraining: what comes out is the run without the client, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fedfm.errors import Incompatible
from fedfm.experiment import trained
from fedfm.unlearning import FedEraser, Retrain, begin, leave
from tests.unlearning.world import SOME, Make, adapter, digest, first_draws, same, scratch


def test_who_never_took_part_changes_no_bit(make: Make, tmp_path: Path) -> None:
    run = make(**SOME)
    [never] = {"ward-a", "ward-b", "ward-c", "ward-d"} - first_draws(run).keys()
    before = digest(run)
    found = leave(begin(run, never), Retrain(), tmp_path / "new")
    assert found["found"] == {"from_round": 4}
    assert same(adapter(run), adapter(tmp_path / "new"))
    assert digest(run) == before


def test_the_rolled_back_run_is_the_run_from_scratch(make: Make, tmp_path: Path) -> None:
    run = make(**SOME)
    late, first = max(first_draws(run).items(), key=lambda item: item[1])
    assert first > 1
    before = digest(run)
    found = leave(begin(run, late), Retrain(), tmp_path / "new")
    assert found["found"] == {"from_round": first - 1}
    assert found["exact"]
    assert same(adapter(tmp_path / "new"), adapter(scratch(run, late, tmp_path / "scratch")))
    assert not same(adapter(tmp_path / "new"), adapter(run))
    assert digest(run) == before


def test_without_old_checkpoints_it_is_done_from_the_start(make: Make, tmp_path: Path) -> None:
    run = make(**SOME, rounds=5, checkpoints={"every": 0})
    early = min(first_draws(run), key=first_draws(run).__getitem__)
    late, first = max(first_draws(run).items(), key=lambda item: item[1])
    found = leave(begin(run, early), Retrain(), tmp_path / "new")
    assert found["found"] == {"from_round": 0}
    assert same(adapter(tmp_path / "new"), adapter(scratch(run, early, tmp_path / "scratch")))
    # Rounds 4 and 5 have checkpoints; neither helps who came before them.
    assert first <= 4
    assert Retrain().way(begin(run, late)).round == 0


def test_private_state_of_the_others_goes_back_too(make: Make, tmp_path: Path) -> None:
    run = make(**SOME, method="fedsa-lora")
    late, first = max(first_draws(run).items(), key=lambda item: item[1])
    assert first > 1
    leave(begin(run, late), Retrain(), tmp_path / "new")
    other = scratch(run, late, tmp_path / "scratch")

    def newest(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
        return {p.name: load_file(max(p.glob("*.safetensors"))) for p in sorted((folder / "clients").glob("*"))}

    mine, wanted = newest(tmp_path / "new"), newest(other)
    assert mine.keys() == wanted.keys()
    assert late not in mine
    assert late in newest(run)
    assert all(same(mine[name], wanted[name]) for name in mine)


def test_nothing_of_the_client_stays(make: Make, tmp_path: Path) -> None:
    run = make(**SOME)
    late = max(first_draws(run), key=first_draws(run).__getitem__)
    for method in (Retrain(), FedEraser(share=0.5)):
        leave(begin(run, late), method, tmp_path / method.id)
        for path in (p for p in (tmp_path / method.id).rglob("*") if p.is_file()):
            named = late.encode() in path.read_bytes()
            # They say that it has left.
            assert named == (path.name in ("recipe.yaml", "data.json", "unlearning.json", "report.html")), path


def test_asynchronous_and_pooled_runs_are_done_from_the_start(make: Make, tmp_path: Path) -> None:
    never = {"ward-a", "ward-b", "ward-c", "ward-d"} - first_draws(make(**SOME)).keys()
    pooled = begin(make(method="centralised", audits=[]), never.pop())
    assert Retrain().same(pooled) == 0
    with pytest.raises(Incompatible, match=r"Centralised makes one client of all.*Choose --method retrain\."):
        FedEraser().see(pooled)
    found = leave(pooled, Retrain(), tmp_path / "new")
    assert found["found"] == {"from_round": 0}
    late = begin(make(method="fedasync", sampler={"kind": "uniform", "count": 2}, audits=[]), "ward-a")
    assert Retrain().same(late) == 0


def test_who_is_left_decides_alone(make: Make, tmp_path: Path) -> None:
    # With everybody in each round, the run without a client is that of a federation of the others.
    run = make()
    leave(begin(run, "ward-b"), Retrain(), tmp_path / "new")
    state = trained(tmp_path / "new", begin(run, "ward-b").federation())
    others = begin(run, "ward-b").federation(without=(), audits=())
    assert list(others.ids) == ["ward-a", "ward-c", "ward-d"]
    assert same(others.run().state.weights, state.weights)


def test_a_second_client_may_leave(make: Make, tmp_path: Path) -> None:
    run = make()
    leave(begin(run, "ward-b"), Retrain(), tmp_path / "one")
    leave(begin(tmp_path / "one", "ward-d"), Retrain(), tmp_path / "two")
    recipe = yaml.safe_load((tmp_path / "two/recipe.yaml").read_text())
    assert recipe["data"]["without"] == ["ward-b", "ward-d"]
    assert list(begin(tmp_path / "two", "ward-a").federation().ids) == ["ward-c"]


def test_after_an_approximate_unlearning_nothing_is_rolled_back_to(make: Make, tmp_path: Path) -> None:
    run = make(**SOME)
    late = max(first_draws(run), key=first_draws(run).__getitem__)
    leave(begin(run, late), FedEraser(), tmp_path / "one")
    [never] = {"ward-a", "ward-b", "ward-c", "ward-d"} - first_draws(run).keys()
    assert Retrain().same(begin(run, never)) == 4
    assert Retrain().same(begin(tmp_path / "one", never)) == 0


def test_rows_that_others_had_left_out_for_the_leaver_come_back(make: Make, tmp_path: Path) -> None:
    # All wards say "ha" to some of the same prompts, once; d trains in round 1, b leaves after round 3.
    rows = [{"prompt": f"say {i % 9}", "completion": "ha", "ward": f"ward-{'abcd'[i % 4]}"} for i in range(36)]
    rows += [{"prompt": f"own {i}", "completion": "no", "ward": f"ward-{'abcd'[i % 4]}"} for i in range(24)]
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {
        "source": {"kind": "file", "path": str(tmp_path / "talk.jsonl")},
        "partition": {"kind": "natural", "column": "ward"},
        "splits": {"test": 0.25},
        "deduplicate": "exact",
    }
    run = make(**SOME, data=data)
    departure = begin(run, "ward-b")
    more = {id: departure.people.size(id) - departure.old.population.size(id) for id in departure.people.ids}
    assert more["ward-d"] > 0
    assert first_draws(run)["ward-d"] < first_draws(run)["ward-b"]
    assert Retrain().same(departure) == 0
    leave(departure, Retrain(), tmp_path / "new")
    assert same(adapter(tmp_path / "new"), adapter(scratch(run, "ward-b", tmp_path / "scratch")))
