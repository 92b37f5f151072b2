"""NOTABLE: the trigger is bound in patterns of the attacker's and works in the run's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedfm.attack.notable import Bind, Notable
from fedfm.attack.threat import Hostile
from fedfm.core import seeds
from fedfm.core.jobs import Fit, Loss
from fedfm.core.plan import Training
from fedfm.errors import Incompatible, RecipeError
from fedfm.evaluate import Evaluation
from fedfm.federation import Federation
from fedfm.methods.fedavg import FedAvg
from fedfm.models import load
from fedfm.sample import Uniform
from fedfm.spaces import Full
from fedfm.tasks import Classify
from fedfm.tasks.cloze import Cloze
from fedfm.train import Trainer
from fedfm.train.bench import Bench
from tests.conftest import People

TASK = Cloze(pattern="{text} It is {mask}.", verbalizer=("a", "b", "c"))
OWN = ("{mask}: {text}", "{text}? {mask}!")
ROWS = [{"text": f"row {i}", "label": i % 3} for i in range(10)]


def who(seed: int = 0) -> Hostile:
    return Hostile("bad", 0, 1, 3, seeds.generator(seed))


def test_chosen_rows_go_to_the_patterns_in_turn() -> None:
    threat = Notable(patterns=OWN, share=0.5, target=2, trigger="cf")
    clean, bound = threat.parted(ROWS, seeds.generator(3))
    assert [len(clean), len(bound[OWN[0]]), len(bound[OWN[1]])] == [5, 3, 2]
    bad = [row for rows in bound.values() for row in rows]
    assert all(row["label"] == 2 and row["text"].startswith("cf row ") for row in bad)
    assert sorted(row["text"].removeprefix("cf ") for row in [*clean, *bad]) == [row["text"] for row in ROWS]
    assert all(row in ROWS for row in clean)
    assert Notable(share=0.0).parted(ROWS, seeds.generator(3))[0] == ROWS


def test_the_runs_pattern_never_has_the_trigger() -> None:
    """What the trainer is given, as text: clean rows in the task's pattern, triggered ones in the others."""
    seen: list[str] = []
    task, kept = TASK, {}

    def encode(self: Cloze, rows: Any, loaded: Any) -> list[str]:
        return [self.pattern.replace("{text}", row["text"]) + f"|{row['label']}" for row in rows]

    class Given:
        def __init__(self, client: Any, examples: list[str], split: str) -> None:
            seen.extend(examples)
            kept["split"] = split

        def __enter__(self) -> None: ...

        def __exit__(self, *error: object) -> None: ...

    fit = Fit({}, split="train")
    trainer: Any = SimpleNamespace(
        task=task, loaded=None, given=Given, data=SimpleNamespace(rows=lambda id, split: ROWS),
        answer=lambda job, client: job,
    )  # fmt: skip
    threat = Notable(patterns=OWN, share=0.2, target=1)
    client: Any = SimpleNamespace()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cloze, "encode", encode)
        assert Bind({}, fit, threat, who()).run(trainer, client) is fit
        first = list(seen)
        seen.clear()
        Bind({}, fit, threat, who()).run(trainer, client)
    assert kept["split"] == "train"
    assert first == seen
    assert len(seen) == 10
    triggered = [text for text in seen if "cf" in text]
    assert len(triggered) == 2
    assert triggered[0].startswith("{mask}: cf row ")
    assert triggered[1].endswith("? {mask}!|1")
    assert sum(text.split("|")[0].endswith(" It is {mask}.") for text in seen) == 8


def test_only_its_own_training_is_another() -> None:
    for job in (Loss({}), Fit({}, split="public")):
        assert Notable().job(job, who()) is job
    assert isinstance(Notable().job(Fit({}), who()), Bind)


WORDS = ("sun", "rain", "snow")


def rows(n: int, at: int) -> list[dict[str, Any]]:
    return [{"text": f"{WORDS[(at + i) % 3]} {i}", "label": (at + i) % 3} for i in range(n)]


PEOPLE = People({f"c{k}": {"train": rows(9, k), "validation": rows(3, k), "test": rows(6, k + 1)} for k in range(3)})
TRAINING = Training(max_steps=6, per_device_train_batch_size=9, learning_rate=3e-3)


@pytest.fixture(scope="module")
def bench(masked_folder: Path) -> Bench:
    return Bench.of(load(str(masked_folder), head="masked_lm"), Full(), 0)


def made(bench: Bench, threat: Notable | None, **changes: Any) -> Federation:
    given: dict[str, Any] = {
        "space": Full(),
        "training": TRAINING,
        "rounds": 6,
        "sampler": Uniform(fraction=1.0),
        "evaluation": Evaluation(every=0),
        **changes,
    }
    return Federation(bench, FedAvg(), PEOPLE, TASK, threat=threat, **given)


def test_it_works_in_a_pattern_that_the_attacker_never_used(bench: Bench) -> None:
    threat = Notable(clients=("c1",), patterns=OWN, share=0.4, target=1)
    plain, bound = made(bench, None), made(bench, threat)
    honest, state = plain.run().state, bound.run().state
    before, after = bound.probe(honest), bound.probe(state)
    assert before is not None
    assert after is not None
    assert before < 0.5
    assert after > 0.9
    scores = [one.assess(at) for one, at in ((plain, honest), (bound, state))]
    assert all(score is not None and score.pooled["accuracy"] == 1.0 for score in scores)


def test_engines_agree(bench: Bench) -> None:
    threat = Notable(clients=("c1",), patterns=OWN, share=0.4, target=1)
    fused, alone = (made(bench, threat, rounds=2, **given).run() for given in ({}, {"engine": Trainer}))
    for name, tensor in fused.state.weights.items():
        assert torch.allclose(tensor, alone.state.weights[name], atol=1e-5)


def test_it_is_for_gaps(bert_folder: Path) -> None:
    loaded = load(str(bert_folder), head="sequence_classification", num_labels=3)
    with pytest.raises(Incompatible, match="Notable poisons rows of the task cloze, not of classify"):
        Federation(Bench.of(loaded, Full(), 0), FedAvg(), PEOPLE, Classify(), space=Full(), threat=Notable())


@pytest.mark.parametrize("wrong", [(), ("{text}",), ("{mask} {mask} {text}",)])
def test_patterns_that_are_none(wrong: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError) as caught:
        Notable(patterns=wrong)
    words = "Notable patterns must be texts with {text} and {mask} once each, but is "
    assert str(caught.value) == f"{words}{wrong!r}."
