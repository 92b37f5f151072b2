"""The table of attacks against defences: which runs it needs, and what they show."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from fedfm import report
from fedfm.attack.fed_ebd import FedEBD
from fedfm.cli.run import _table
from fedfm.core.plan import Training
from fedfm.errors import Incompatible, RecipeError
from fedfm.evaluate import Evaluation
from fedfm.experiment import Experiment
from fedfm.federation import Federation
from fedfm.matrix import Matrix
from fedfm.methods.fedavg import FedAvg
from fedfm.models import load
from fedfm.recipe import parse
from fedfm.robust import Krum, Median, TrimmedMean
from fedfm.robust.multi_krum import MultiKrum
from fedfm.sample import Uniform
from fedfm.schedule.synchronous import Synchronous
from fedfm.schedule.zenopp import ZenoPP
from fedfm.spaces import Full
from fedfm.tasks import Classify
from fedfm.train.bench import Bench
from fedfm.wire.clip import Clip
from fedfm.wire.half import Half
from tests.conftest import People

OWN = "fedfm.wire.half:Half"
WORDS = ("sun", "rain", "snow")


def rows(n: int, at: int) -> list[dict[str, Any]]:
    return [{"text": f"{WORDS[(at + i) % 3]} {i}", "label": (at + i) % 3} for i in range(n)]


CLIENTS = People({f"c{k}": {"train": rows(9, k), "validation": rows(3, k), "test": rows(6, k + 1)} for k in range(5)})
TRAINING = Training(max_steps=3, per_device_train_batch_size=9, learning_rate=3e-3)


@pytest.fixture(scope="module")
def bench(bert_folder: Path) -> Bench:
    loaded = load(str(bert_folder), head="sequence_classification", num_labels=3)
    return Bench.of(loaded, Full(), 0)


def made(bench: Bench, **changes: Any) -> Federation:
    given: dict[str, Any] = {
        "space": Full(),
        "training": TRAINING,
        "rounds": 6,
        "sampler": Uniform(fraction=1.0),
        "evaluation": Evaluation(every=0),
        "public": rows(9, 0),
        **changes,
    }
    return Federation(bench, FedAvg(), CLIENTS, Classify(), **given)


def accuracy(one: Federation) -> float:
    found = one.assess(one.run().state)
    assert found is not None
    return found.pooled["accuracy"]


def test_every_attack_meets_every_defence(bench: Bench) -> None:
    defences = ["krum", {"kind": "multi-krum", "hostile": 1}, "median", {"kind": "clip", "max_norm": 0.5}, OWN]
    attacks = ["sign-flip", {"kind": "label-flip", "clients": 0.4}]
    table = Matrix(made(bench), attacks, defences)
    runs = table.runs()
    names = [("none", "sign-flip", "label-flip"), ("none", "krum", "multi-krum", "median", "clip", OWN)]
    assert list(runs) == [f"{attack}+{defence}" for attack, defence in product(*names)]
    assert runs["none+none"] is table.main
    # 0.2 and 0.4 of 5 clients are 1 and 2; without an attack a defence bears as many as with the worst.
    assert runs["sign-flip+krum"].screens == (Krum(hostile=1),)
    assert runs["label-flip+krum"].screens == (Krum(hostile=2),)
    assert runs["none+krum"].screens == (Krum(hostile=2),)
    assert runs["label-flip+multi-krum"].screens == (MultiKrum(hostile=1),)
    assert runs["sign-flip+median"].mean == Median()
    assert runs["sign-flip+clip"].stages == (Clip(0.5),)
    assert runs[f"sign-flip+{OWN}"].stages == (Half(),)
    assert runs["none+krum"].threat is None
    assert runs["label-flip+krum"].threat == runs["label-flip+none"].threat


def test_a_schedule_is_a_defence_of_attacks_that_need_no_others(bench: Bench) -> None:
    runs = Matrix(made(bench), ["sign-flip"], ["zenopp"]).runs()
    assert runs["sign-flip+zenopp"].schedule == ZenoPP()
    assert isinstance(runs["sign-flip+none"].schedule, Synchronous)
    with pytest.raises(Incompatible, match="ALIE looks at the uploads of a whole round, but ZenoPP takes them one by"):
        Matrix(made(bench), ["alie"], ["zenopp"]).runs()


def test_defences_of_the_recipe_stay(bench: Bench) -> None:
    main = made(bench, screens=(MultiKrum(hostile=1),), stages=(Clip(1.0),))
    runs = Matrix(main, ["sign-flip"], ["krum", {"kind": "clip", "max_norm": 0.5}]).runs()
    assert runs["sign-flip+krum"].screens == (MultiKrum(hostile=1), Krum(hostile=1))
    assert runs["sign-flip+clip"].stages == (Clip(1.0), Clip(0.5))
    with pytest.raises(RecipeError, match=r"there is a mean already \(TrimmedMean\)\. Leave it out"):
        Matrix(made(bench, mean=TrimmedMean()), [], ["median"]).runs()


@pytest.mark.parametrize(
    ("attacks", "defences", "words"),
    [
        (["sign-flop"], [], "attacks.0 has no kind 'sign-flop'. Did you mean 'sign-flip'?"),
        ([], ["medain"], "defences.0 has no kind 'medain'. Did you mean 'median'?"),
        (["alie", "alie"], [], "attacks.1 names 'alie', which is there already. Leave it out."),
        ([], ["none"], "defences.0 names 'none', which is always there. Leave it out."),
    ],
)
def test_what_there_is_not(bench: Bench, attacks: list[str], defences: list[str], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Matrix(made(bench), attacks, defences).runs()
    assert str(caught.value).startswith(words)


def test_a_defence_that_does_not_compose_is_refused_when_built(bench: Bench) -> None:
    with pytest.raises(Incompatible, match="LocalGaussian needs BOUNDED"):
        Matrix(made(bench), ["sign-flip"], [{"kind": "local-gaussian", "std": 1.0}]).runs()


def test_defences_bear_what_the_plain_mean_does_not(bench: Bench) -> None:
    """One of five clients turns its upload around, enlarged: the mean unlearns, Krum and the median learn on."""
    attack = {"kind": "sign-flip", "scale": 10.0}
    runs = Matrix(made(bench), [attack], ["krum", "median"]).runs()
    assert accuracy(runs["none+none"]) == 1.0
    assert accuracy(runs["sign-flip+none"]) < 0.5
    assert accuracy(runs["sign-flip+krum"]) == 1.0
    assert accuracy(runs["sign-flip+median"]) == 1.0


def test_a_compromised_foundation_model_outlives_honest_rounds(bench: Bench) -> None:
    """No upload is forged and no client's row is poisoned, and yet the trigger works after honest training."""
    threat = FedEBD(share=0.5, steps=40, target=2)
    bad, clean = made(bench, threat=threat, rounds=2), made(bench, rounds=2)
    assert bad.attack is not None
    assert bad.attack.describe() == "the foundation model is hostile (FedEBD)"
    state = bad.run().state
    after = bad.probe(state)
    assert after is not None
    assert after > 0.9
    assert bad.probe(clean.run().state) < 0.9  # type: ignore[operator]
    # Only what is handed out at first differs: with its steps at 0 all is as without it.
    idle = made(bench, threat=replace(threat, steps=0), rounds=2).run().state
    other = clean.run().state
    assert all((t == other.weights[n]).all() for n, t in idle.weights.items())


def content(bert_folder: Path, tmp_path: Path) -> dict[str, Any]:
    place = tmp_path / "rows.jsonl"
    place.write_text("\n".join(json.dumps({**r, "n": i}) for i, r in enumerate(rows(60, 0))))
    return {
        "model": str(bert_folder),
        "method": "fedavg",
        "space": {"kind": "lora", "r": 2},
        "task": "classify",
        "data": {"source": {"kind": "file", "path": str(place)}, "partition": {"kind": "iid", "num_clients": 5}},
        "training": {"max_steps": 1},
        "rounds": 1,
        "output_dir": str(tmp_path / "run"),
    }


def test_a_recipe_with_a_table(bert_folder: Path, tmp_path: Path) -> None:
    recipe = parse({**content(bert_folder, tmp_path), "attacks": ["badnets", "sign-flip"], "defences": ["median"]})
    experiment = Experiment(recipe)
    results = experiment.run(observers=lambda folder: ())
    table = results["matrix"]
    assert (table["attacks"], table["defences"]) == (["none", "badnets", "sign-flip"], ["none", "median"])
    assert table["metric"] == "accuracy"
    assert table["hostile"]["badnets"] == "1 of 5 clients are hostile (BadNets)"
    cells = table["cells"]
    assert all(0 <= cell["quality"] <= 1 for cell in cells.values())
    assert [name for name, cell in cells.items() if cell["attack_success"] is not None] == [
        "badnets+none",
        "badnets+median",
    ]
    # The hostile client is scored in no cell.
    [bad] = experiment.runs["badnets+none"].attack.hostile  # type: ignore[union-attr]
    scores = {c: m["accuracy"] for c, m in results["test"]["fedavg"]["clients"].items() if c != bad}
    assert cells["none+none"]["quality"] == pytest.approx(sum(scores.values()) / len(scores))
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Attacks and defences" in page
    assert "1 of 5 clients are hostile (SignFlip)" in page
    assert "badnets, median: " in page
    shown = report.matrix(results)
    assert [c.header for c in shown.columns] == ["attack", "none", "median"]
    # Gone on with, everything is there already, and the numbers are the same.
    again = Experiment(parse({**content(bert_folder, tmp_path), "attacks": ["badnets", "sign-flip"],
                              "defences": ["median"]})).run(resume=True, observers=lambda folder: ())  # fmt: skip
    assert again["matrix"] == table


def test_a_recipe_with_a_threat_says_so_everywhere(bert_folder: Path, tmp_path: Path) -> None:
    recipe = parse({**content(bert_folder, tmp_path), "threat": {"kind": "badnets", "clients": ["client-00004"]}})
    assert recipe.resolved()["threat"]["clients"] == ["client-00004"]
    experiment = Experiment(recipe)
    results = experiment.run(observers=lambda folder: ())
    assert results["threat"]["says"] == "1 of 5 clients are hostile (BadNets)"
    assert set(results["attack_success"]) == {"base", "fedavg"}
    page = (tmp_path / "run" / "report.html").read_text()
    assert "A simulation of attacks: 1 of 5 clients are hostile (BadNets)." in page
    assert "Success of the attack by round" in page
    assert "attack success" in page


def test_without_a_threat_nothing_is_said(bert_folder: Path, tmp_path: Path) -> None:
    results = Experiment(parse(content(bert_folder, tmp_path))).run(observers=lambda folder: ())
    assert not {"threat", "matrix", "attack_success"} & results.keys()
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert not {"hostile", "attack_success", "threat"} & record.keys()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "simulation of attacks" not in page
    assert "Attacks and defences" not in page


def test_one_threat_or_many(bert_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        parse({**content(bert_folder, tmp_path), "threat": "alie", "attacks": ["alie"]})
    assert str(caught.value) == (
        "threat is one attack on the run and attacks are many, each on a run of its own. Leave one out."
    )
    with pytest.raises(RecipeError, match=r"attacks\.0 has no kind 'ali'\. Did you mean 'alie'"):
        parse({**content(bert_folder, tmp_path), "attacks": ["ali"]})


def test_not_on_a_cluster(bert_folder: Path, tmp_path: Path) -> None:
    recipe = parse({**content(bert_folder, tmp_path), "threat": "sign-flip", "engine": "ray"})
    with pytest.raises(RecipeError) as caught:
        Experiment(recipe).run(observers=lambda folder: ())
    assert str(caught.value) == "threats are for simulations in one process. Set engine to fused or sequential."


def test_the_table_from_the_command_line(bert_folder: Path, tmp_path: Path) -> None:
    plan = parse({**content(bert_folder, tmp_path), "references": ["local-only"]})
    made = _table(plan, "", "alie, none,fed-ebd", "krum,none,median", 0.4)
    assert made.attacks == ({"kind": "alie", "clients": 0.4}, {"kind": "fed-ebd"})
    assert made.defences == ("krum", "median")
    assert (made.method, made.references) == ("fedavg", ())
    assert _table(plan, "fedprox", "alie", "", None).method == "fedprox"
    assert _table(plan, "", "alie", "", None).attacks == ({"kind": "alie"},)
    kept = parse({**content(bert_folder, tmp_path), "attacks": [{"kind": "alie", "z": 1.0}]})
    assert _table(kept, "", "", "krum", None).attacks == kept.attacks
    for arguments, words in (
        (("fedavg,fedprox", "alie", "", None), "attacks and defences are tried on one method, but --methods got"),
        (("", "alei", "", None), "--attacks has no kind 'alei'. Did you mean 'alie'?"),
        (("", "", "krum", 0.2), "--hostile is the share of hostile clients of --attacks, which are not given."),
    ):
        with pytest.raises(RecipeError) as caught:
            _table(plan, *arguments)
        assert str(caught.value).startswith(words)
