"""WAFFLE: every model that leaves the server is marked, no other one is claimed, and nothing else changes."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedfm.core.client import View
from fedfm.core.jobs import Fit
from fedfm.core.method import Method
from fedfm.core.update import Member, Tensors
from fedfm.errors import Incompatible, RecipeError
from fedfm.federation import Federation
from fedfm.links.flower import InMemoryFlower
from fedfm.methods.fedavg import FedAvg
from fedfm.methods.local_only import LocalOnly
from fedfm.methods.lora.flexlora import FlexLoRA
from fedfm.ownership.key import FILE, PUBLIC, Key, committed
from fedfm.ownership.marking import Desk
from fedfm.ownership.waffle import Waffle
from fedfm.ownership.watermark import OWNER
from fedfm.sample import Uniform
from fedfm.secure.secagg import SecAgg
from fedfm.tasks import MaskedLM
from fedfm.train import Trainer
from fedfm.wire import Clip, Gaussian
from tests.contract.world import Watched
from tests.ownership.world import ADAPTER, FEW, federation

MARK = Waffle(**FEW)


def far(left: Tensors, right: Tensors) -> float:
    return max(float((left[n] - right[n]).abs().max()) for n in left)


def test_every_dispatched_model_answers_the_marks(bert_folder: Path) -> None:
    links: list[Watched] = []
    made = federation(bert_folder, watermark=MARK)
    made.link = lambda *a, **k: links.append(Watched(*a, **k)) or links[-1]  # type: ignore[assignment,func-returns-value]
    outcome = made.run()
    assert made.marking
    desk = Desk(made.marking, 1, False)
    sent = [message for _, messages, _ in links[0].log for message in messages.values()]
    assert len(sent) == 6
    for message in (*sent[::3], made.result(outcome.state)):
        assert desk.known({OWNER: message})[OWNER] >= 0.98
        assert made.marking.verify(message).matches == 12
    assert [record["watermark"]["matches"] for record in outcome.records[1:]] == [12, 12]
    # Clients learn nothing of the marks: what they are asked for is what they are asked for without a watermark.
    assert {name for message in sent for name in message} == set(made.start().weights)


def test_models_made_without_the_key_are_not_claimed(bert_folder: Path) -> None:
    made, plain = federation(bert_folder, watermark=MARK), federation(bert_folder)
    assert made.marking
    for tensors in (made.start().weights, plain.run().state.weights):
        verdict = made.marking.verify(tensors)
        assert verdict.matches < verdict.threshold == 11
        assert not verdict.verified
        assert verdict.says().startswith(f"no mark found: {verdict.matches} of 12 marks match, 11 are needed (p = ")
    other = federation(bert_folder, watermark=MARK, secret=7)
    assert other.marking
    assert not other.marking.verify(made.run().state.weights).verified


def test_the_mark_outlives_fine_tuning(bert_folder: Path) -> None:
    # Twelve marks in a tiny model are few: they are taught as firmly in the round as before it.
    made = federation(bert_folder, watermark=replace(MARK, renewal=1.0), rounds=1)
    weights = made.run().state.weights
    assert made.marking
    tuned = made.trainer.answer(
        Fit(weights, max_steps=4, rate=0.1, purpose="theft"), View(Member("ann", 12), 1)
    ).tensors
    assert far(tuned, weights) > 1e-3
    assert made.marking.verify(tuned).verified


def test_without_a_watermark_nothing_changes(bert_folder: Path) -> None:
    """The clients' draws are those of a run without one; a mark that needs no teaching leaves all bits as they are."""
    plain = federation(bert_folder).run()
    idle = federation(bert_folder, watermark=Idle(**FEW)).run()
    assert far(plain.state.weights, idle.state.weights) == 0
    assert [r["train_loss"] for r in plain.records[1:]] == [r["train_loss"] for r in idle.records[1:]]
    assert "watermark" not in plain.records[0]


class Idle(Waffle):
    """Teaches nothing."""

    def embed(self, owner: Any, weights: Tensors) -> Tensors:
        return weights


def test_a_resumed_run_is_the_same(bert_folder: Path, tmp_path: Path) -> None:
    whole = federation(bert_folder, watermark=MARK, rounds=3).run(tmp_path / "whole")
    cut = federation(bert_folder, watermark=MARK, rounds=3)
    assert cut.layout.rounds == 3
    cut.plan = replace(cut.plan, rounds=2)
    cut.run(tmp_path / "cut")
    before = committed(tmp_path / "cut" / PUBLIC)
    (tmp_path / "cut/status.json").unlink()
    resumed = federation(bert_folder, watermark=MARK, rounds=3).run(tmp_path / "cut", resume=True)
    assert far(whole.state.weights, resumed.state.weights) == 0
    assert committed(tmp_path / "cut" / PUBLIC) == before == Key.read(tmp_path / "cut" / FILE).commitment
    for change, what in (({"secret": 5}, "the key in .* is not the one"), ({"seed": 5}, "cannot resume")):
        with pytest.raises(RecipeError, match=what):
            federation(bert_folder, watermark=MARK, rounds=3, **change).run(tmp_path / "cut", resume=True)
    (tmp_path / "cut" / FILE).unlink()  # Kept elsewhere; a new nonce would not open the commitment.
    with pytest.raises(RecipeError, match=r"watermark.json commits to a key, but watermark.key is not beside it"):
        federation(bert_folder, watermark=MARK, rounds=3).run(tmp_path / "cut", resume=True)
    assert committed(tmp_path / "cut" / PUBLIC) == before


def test_the_key_is_committed_to_before_training(bert_folder: Path, tmp_path: Path) -> None:
    made = federation(bert_folder, watermark=MARK, rounds=1)
    begun: list[bool] = []
    made.trainer.pulse = lambda steps: None
    one, marking = made.trainer.answers, made.marking
    assert marking

    def answers(asked: Any) -> Any:
        begun.append((tmp_path / "run" / PUBLIC).exists())
        return one(asked)

    made.trainer.answers = answers  # type: ignore[method-assign]
    outcome = made.run(tmp_path / "run")
    assert begun
    assert all(begun)
    assert stat.S_IMODE((tmp_path / "run" / FILE).stat().st_mode) == 0o600
    assert outcome.records[0]["watermark"] == {"kind": "waffle", "commitment": committed(tmp_path / "run" / PUBLIC)}
    text = json.loads((tmp_path / "run" / FILE).read_text())["content"]["keys"][OWNER][0]["text"]
    shown = [p for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != FILE]
    assert not any(text.encode() in path.read_bytes() for path in shown)


def test_fused_equals_sequential(bert_folder: Path) -> None:
    runs = [
        federation(bert_folder, watermark=MARK, space=ADAPTER, rounds=1, **e).run() for e in ({}, {"engine": Trainer})
    ]
    assert far(runs[0].state.weights, runs[1].state.weights) < 1e-4


def test_over_flower_it_is_the_same(bert_folder: Path) -> None:
    settings: dict[str, Any] = {"watermark": MARK, "rounds": 1, "engine": Trainer}
    here = federation(bert_folder, **settings).run()
    there = federation(bert_folder, link=InMemoryFlower, **settings).run()
    assert far(here.state.weights, there.state.weights) < 1e-5


@pytest.mark.parametrize(
    "beside",
    [
        {"secure": SecAgg()},
        {"stages": (Clip(1.0), Gaussian(noise_multiplier=0.01)), "sampler": Uniform(fraction=1.0)},
    ],
    ids=["secagg", "noise"],
)
def test_it_goes_with_what_hides_uploads(bert_folder: Path, beside: Mapping[str, Any]) -> None:
    """The server works on the aggregate alone; and with no data, so that no privacy is spent."""
    made = federation(bert_folder, watermark=MARK, rounds=1, **beside)
    assert made.spent(1) == federation(bert_folder, rounds=1, **beside).spent(1)
    assert made.marking
    assert made.marking.verify(made.run().state.weights).verified


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (LocalOnly, "Waffle needs GLOBAL .* which LocalOnly does not promise. Only a model that all share"),
        (FlexLoRA, "Waffle needs RULED .* which FlexLoRA does not promise. The server must be free to change"),
    ],
)
def test_what_cannot_be_marked_is_refused(
    federation_of_llamas: Callable[..., Federation], method: type[Method], words: str
) -> None:
    with pytest.raises(Incompatible, match=words):
        federation_of_llamas(method(), watermark=MARK)


@pytest.fixture
def federation_of_llamas(federation: Callable[..., Federation]) -> Callable[..., Federation]:
    return federation


def test_a_task_without_answers_is_refused(masked_folder: Path) -> None:
    with pytest.raises(Incompatible, match=r"Waffle is for the task chat or causal-lm or .*, not for masked-lm"):
        federation(masked_folder, task=MaskedLM(), load={}, watermark=MARK)


def test_too_few_marks_are_refused_before_training(bert_folder: Path) -> None:
    # 3**-40 = 8.2e-20 is above 2**-64 = 5.4e-20, and 3**-41 below.
    with pytest.raises(RecipeError, match="with 3 answers to choose from not even all of 40 patterns would claim"):
        federation(bert_folder, watermark=Waffle(marks=40)).run()
    made = federation(bert_folder, watermark=Waffle(marks=41))
    assert made.marking
    assert made.marking.key.content["chance"] == 1 / 3


def test_the_key_is_drawn_from_a_secret_file(bert_folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "owner.secret"

    def key(**settings: Any) -> Key:
        marking = federation(bert_folder, watermark=Waffle(**FEW, **settings)).marking
        assert marking
        return marking.key

    mine = key(secret=str(place))
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    assert mine.same(key(secret=str(place)))
    assert not mine.same(key())
    place.write_bytes(b"short")
    with pytest.raises(RecipeError, match="must hold 16 bytes or more that nobody else has, but has 5"):
        key(secret=str(place))


def test_after_an_aggregation_it_is_taught_gently() -> None:
    """Half of the run's rate before training, a twentieth of that later; and no pass where enough is known."""
    rates: list[float] = []

    class Clerk:
        round = 0
        last = False
        share = 0.0

        def known(self, models: Mapping[str, Tensors]) -> dict[str, float]:
            return dict.fromkeys(models, self.share)

        def taught(self, models: Mapping[str, Tensors], rate: float, **settings: Any) -> dict[str, Tensors]:
            rates.append(rate)
            return dict(models)

    clerk, mark = Clerk(), Waffle(rate=0.5, epochs=2)
    mark.embed(clerk, {})
    clerk.round = 3
    mark.embed(clerk, {})
    assert rates == pytest.approx([0.5, 0.5, 0.025, 0.025])
    clerk.share = 0.98
    mark.embed(clerk, {})
    assert len(rates) == 4


def test_settings_are_checked() -> None:
    for name, value, words in (
        ("marks", 0, "at least 1"),
        ("patterns", 101, "at most marks"),
        ("accuracy", 0, "above 0 and at most 1"),
        ("epochs", 0, "at least 1"),
        ("rate", 0, "above 0"),
        ("renewal", 0, "above 0"),
        ("false_positive", 1, "above 0 and below 1"),
    ):
        with pytest.raises(RecipeError, match=f"Waffle {name} must be {words}"):
            Waffle(**{name: value})


def test_a_method_that_brings_no_mark_has_none(bert_folder: Path) -> None:
    made = federation(bert_folder, watermark=MARK)
    assert made.like(FedAvg()).marking is None
    assert torch.equal(*(f.start().weights["classifier.bias"] for f in (made, federation(bert_folder))))
