"""The fidelity benchmark: every method has a claim, the rule is applied as stated, a killed command goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from benchmarks.fidelity import run, scenarios, table, trial
from benchmarks.fidelity.claim import Claim
from benchmarks.fidelity.claims import CLAIMS, UNTRIED
from benchmarks.fidelity.scenarios import SCENARIOS, Scenario
from benchmarks.fidelity.trial import SEEDS
from fedfm import parts
from fedfm.data import Iid, federate
from fedfm.evaluate import Assessment

SPLITS = ("train", "validation", "test")
PUBLISHED = {cls.id for _, cls in parts.published()}


def score(value: float | None, bytes_up: int = 100) -> dict[str, Any]:
    return {"accuracy": value, "loss": value, "bytes_up": bytes_up}


def test_every_published_method_has_a_claim() -> None:
    assert not (missing := PUBLISHED - CLAIMS.keys() - UNTRIED.keys()), (
        f"without an entry in benchmarks/fidelity/claims.py: {missing}"
    )


@pytest.mark.parametrize("id", CLAIMS)
def test_claims_name_what_there_is(id: str) -> None:
    claim = CLAIMS[id]
    assert claim.scenario in SCENARIOS
    assert claim.metric.removeprefix("mean ") in ("accuracy", "loss", "wer", "attack_success", "told", "traced")
    assert claim.sentence.endswith(".")
    assert claim.note.endswith(".")


def test_better_means_above_the_standard_error() -> None:
    # Differences 0.1, 0.2, 0.3: mean 0.2, standard deviation 0.1, standard error 0.1 / sqrt(3) = 0.0577.
    verdict = Claim("c").judge([score(0.6), score(0.7), score(0.8)], [score(0.5)] * 3)
    assert verdict.difference == pytest.approx(0.2)
    assert verdict.standard_error == pytest.approx(0.057735, abs=1e-6)
    assert verdict.claim_shown
    # Differences -0.1, 0.1, 0.1: mean 0.0333, standard deviation 0.1155, standard error 0.0667.
    assert not Claim("c").judge([score(0.4), score(0.6), score(0.6)], [score(0.5)] * 3).claim_shown


def test_less_loss_is_better() -> None:
    low, high = [score(1.0), score(1.1)], [score(2.0), score(2.2)]
    assert Claim("c", metric="loss").judge(low, high).claim_shown
    assert Claim("c", metric="mean loss").lower
    assert Claim("c", metric="attack_success").lower
    assert not Claim("c", metric="loss").judge(high, low).claim_shown
    assert Claim("c", metric="loss", expect="worse").judge(high, low).claim_shown


def test_near_asks_for_quality_and_bytes() -> None:
    claim = Claim("c", expect="near", within=0.02, bytes_up=0.5)
    baseline = [score(0.5, 100)] * 2
    assert claim.judge([score(0.49, 50)] * 2, baseline).claim_shown
    assert not claim.judge([score(0.49, 51)] * 2, baseline).claim_shown
    assert not claim.judge([score(0.47, 50)] * 2, baseline).claim_shown


@pytest.mark.parametrize("expect", ["better", "worse", "near"])
def test_one_seed_and_diverged_runs_show_nothing(expect: Any) -> None:
    claim = Claim("c", expect=expect, within=9.0)
    assert not claim.judge([score(0.9)], [score(0.1)]).claim_shown
    assert not claim.judge([score(0.1)], [score(0.9)]).claim_shown
    assert not claim.judge([score(None), score(0.9)], [score(0.1)] * 2).claim_shown


def test_clients_with_wrong_labels_are_not_scored() -> None:
    # 2 of 4 rows and 6 of 6 rows right: 8 of 10 over all rows, 0.75 over clients. The liar's ten rows count nowhere.
    clients = {"a": {"accuracy": 0.5}, "b": {"accuracy": 1.0}, "liar-1": {"accuracy": 0.0}}
    found = Assessment({}, {}, 0.0, clients, {"a": 4, "b": 6, "liar-1": 10})
    assert trial.scores(found) == {"accuracy": pytest.approx(0.8), "mean accuracy": pytest.approx(0.75)}


def test_a_third_of_the_clients_lie_about_training_rows() -> None:
    made = scenarios.lied(clients=3, liars=1, each=20, public=4)(0)
    assert sorted(made["members"].ids) == ["client-00", "client-01", "liar-02"]
    truth = {row["text"]: row["label"] for row in scenarios.headlines().rows}
    wrong = {
        c: sum(truth[r["text"]] != r["label"] for r in made["members"].rows(c, "train")) for c in made["members"].ids
    }
    assert wrong["client-00"] == wrong["client-01"] == 0
    assert wrong["liar-02"] == len(made["members"].rows("liar-02", "train"))


def test_without_liars_nobody_lies() -> None:
    made = scenarios.lied(clients=3, liars=0, each=20, public=4)(0)
    assert list(made["members"].ids) == ["client-00", "client-01", "client-02"]
    own = [row for id in made["members"].ids for split in SPLITS for row in made["members"].rows(id, split)]
    rows = scenarios.headlines().some(3 * 20 + 4, 0)[: 3 * 20]
    assert sorted((row["text"], row["label"]) for row in own) == sorted((row["text"], row["label"]) for row in rows)


def test_public_rows_belong_to_no_client() -> None:
    made = scenarios.dealt(scenarios.headlines, Iid(2), 40, public=10)(0)
    people = made["members"]
    held = {r["text"] for c in people.ids for s in ("train", "validation", "test") for r in people.rows(c, s)}
    assert len(made["public"]) == 10
    assert not held & {row["text"] for row in made["public"]}


def test_embedded_data_stand_in_and_say_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(scenarios, "DATA", tmp_path)
    corpus = scenarios.headlines.__wrapped__()
    assert "absent" in corpus.about
    assert corpus.classes == 5
    assert len(corpus.some(10, seed=0)) == 10


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bert_folder: Path) -> Path:
    """A scenario of seconds, and results in a folder of the test."""

    def make(seed: int) -> dict[str, Any]:
        rows = [{"text": f"{'abc'[i % 3]} {i}", "label": i % 3} for i in range(30)]
        return {"members": federate(Dataset.from_list(rows), Iid(2), seed=seed), "load": {"num_labels": 3}}

    settings = {
        "task": {"kind": "classify", "max_length": 8},
        "space": {"kind": "lora", "r": 2},
        "training": {"max_steps": 1, "per_device_train_batch_size": 4},
        "rounds": 2,
    }
    monkeypatch.setitem(SCENARIOS, "tiny", Scenario("two clients", make, settings, model=str(bert_folder)))
    monkeypatch.setitem(CLAIMS, "local-only", Claim("A lower bound.", "tiny", expect="worse", note="Too small."))
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(run, "PAGE", tmp_path / "fidelity.md")
    return tmp_path


def test_a_result_holds_what_is_promised(tiny: Path) -> None:
    assert run.main(["local-only"]) == 0
    result = json.loads((tiny / "results" / "local-only.json").read_text())
    assert result["seeds"] == list(SEEDS)
    for who in ("method", "baseline"):
        assert len(result[who]["values"]) == 3
        assert {"mean", "spread", "bytes_up", "bytes_down", "seconds", "memory_mb"} <= result[who].keys()
    assert result["method"]["arguments"] == {"method": "local-only"}
    assert result["method"]["bytes_up"] < result["baseline"]["bytes_up"]
    assert result["setting"] == f"two clients, {SCENARIOS['tiny'].model}"
    assert result["note"] == ("" if result["claim_shown"] else "Too small.")
    run.main(["--table"])
    page = (tiny / "fidelity.md").read_text()
    assert "| [local-only](#local-only) | fedavg | accuracy (higher is better) |" in page


def test_a_killed_command_goes_on_where_it_was(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[int, Any]] = []
    real = trial.trial

    def counted(scenario: str, seed: int, changes: Any) -> Any:
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append((seed, changes["method"]))
        return real(scenario, seed, changes)

    monkeypatch.setattr(trial, "trial", counted)
    with pytest.raises(KeyboardInterrupt):
        run.main(["local-only"])
    assert not (tiny / "results" / "local-only.json").exists()
    before, ran[:] = list(ran), []
    assert run.main(["local-only"]) == 0
    first, second, third = SEEDS
    assert before == [(first, "local-only"), (first, "fedavg"), (second, "local-only")]
    assert ran == [(second, "fedavg"), (third, "local-only"), (third, "fedavg")]


def test_a_change_in_the_code_makes_runs_new(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run.main(["--quick", "local-only"])
    runs = tiny / "results" / ".runs"
    before = len(list(runs.glob("*.json")))
    run.main(["--quick", "local-only"])
    assert len(list(runs.glob("*.json"))) == before == 2
    monkeypatch.setattr(trial, "source", lambda: "another")
    run.main(["--quick", "local-only"])
    assert len(list(runs.glob("*.json"))) == 4
    assert not (tiny / "results" / "local-only.json").exists()


def test_a_method_that_cannot_run_is_named(tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(CLAIMS, "broken", Claim("c.", "tiny", run={"method": "no-such-method"}))
    assert run.main(["--quick", "broken", "local-only"]) == 1
    out, err = capsys.readouterr()
    assert "local-only: runs" in out
    assert "could not be tried: broken" in err


def test_the_page_tells_shown_from_not_shown(tmp_path: Path) -> None:
    side = {"arguments": {"method": "x"}, "mean": 0.5, "spread": 0.01, "bytes_up": 2e6, "bytes_down": 1e6}
    side |= {"seconds": 3.0, "memory_mb": 700}
    common = {"claim": "C.", "setting": "s", "metric": "accuracy", "better": "higher", "rule": "r"}
    for id, shown in (("good", True), ("bad", False)):
        result = {**common, "id": id, "method": side, "baseline": {**side, "mean": None}, "claim_shown": shown}
        (tmp_path / f"{id}.json").write_text(json.dumps({**result, "note": "" if shown else "Too few rounds."}))
    text = table.page(tmp_path)
    assert "1 of 2 claims show" in text
    assert "0.500 ± 0.010 | diverged" in text
    assert "Not shown; the likely reason: Too few rounds." in text
    assert text.index("[bad](#bad)") < text.index("[good](#good)")
