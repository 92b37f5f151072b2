"""DUW: each client has a copy of its own, and a leaked one names its client."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedfm.core.plan import Training
from fedfm.core.update import Member, Tensors
from fedfm.errors import Incompatible, RecipeError
from fedfm.methods.fedavg import FedAvg
from fedfm.methods.optim.scaffold import Scaffold
from fedfm.ownership.duw import DUW
from fedfm.ownership.watermark import Owner
from fedfm.schedule.buffered import Buffered
from fedfm.train import Trainer
from tests.contract.world import Watched
from tests.ownership.world import ADAPTER, FEW, federation

MARK = DUW(**FEW)


class Off(DUW):
    """Nothing is injected."""

    def dispatch(self, owner: Owner, messages: Mapping[str, Tensors]) -> Mapping[str, Tensors]:
        return messages


def sent(folder: Path, **settings: Any) -> tuple[Any, Any, list[Mapping[Member, Tensors]]]:
    """A federation, its outcome, and what it sent in each round."""
    links: list[Watched] = []
    made = federation(folder, **settings)
    made.link = lambda *a, **k: links.append(Watched(*a, **k)) or links[-1]  # type: ignore[assignment,func-returns-value]
    outcome = made.run()
    return made, outcome, [messages for _, messages, _ in links[0].log]


def test_a_copy_answers_its_own_marks_and_no_others(bert_folder: Path, tmp_path: Path) -> None:
    made, outcome, [messages] = sent(bert_folder, watermark=MARK, rounds=1)
    assert made.marking
    bodies = list(messages.values())
    assert not any(
        torch.equal(a["classifier.weight"], b["classifier.weight"])
        for i, a in enumerate(bodies)
        for b in bodies[i + 1 :]
    )
    for member, message in messages.items():
        verdict = made.marking.verify(message)
        assert verdict.rates[member.id] >= 0.99
        # At chance: 4 of 12 on average, with a standard deviation of 1.6.
        assert all(rate <= 9 / 12 for name, rate in verdict.rates.items() if name != member.id)
        assert verdict.claims == [verdict.who] == [member.id]
        assert verdict.gap == pytest.approx(1 - verdict.rates[verdict.runner_up])
        assert verdict.says().startswith(f"carries the mark of {member.id}: 12 of 12 marks match, 12 are needed (p = ")
    assert not made.marking.verify(outcome.state.weights).verified  # the server's own model is nobody's copy
    results = made.marking.results(outcome.state)
    assert (results["traced"], results["of"]) == (3, 3)
    assert results["says"].startswith("3 of 3 clients' copies that were tried are traced to their client")
    made.marking.save(outcome.state, tmp_path)
    copy = load_file(tmp_path / "copies/bob/model.safetensors")
    assert made.marking.verify(copy).who == "bob"


def test_without_injection_all_receive_the_same(bert_folder: Path) -> None:
    _, outcome, rounds = sent(bert_folder, watermark=Off(**FEW))
    for messages in rounds:
        first, *others = messages.values()
        assert all(torch.equal(first[n], other[n]) for other in others for n in first)
    plain = federation(bert_folder).run()
    assert all(torch.equal(t, plain.state.weights[n]) for n, t in outcome.state.weights.items())


def test_an_upload_is_the_change_of_ones_own_copy(bert_folder: Path) -> None:
    """With a learning rate of next to nothing clients send nothing, so the server's model stays as it was: no mark
    travels back."""
    small = Training(max_steps=1, per_device_train_batch_size=8, learning_rate=1e-9)
    settings: dict[str, Any] = {"watermark": DUW(**FEW, rate=1e7, epochs=3), "rounds": 1, "training": small}
    made, outcome, [messages] = sent(bert_folder, **settings)
    before, after = made.start().weights, outcome.state.weights

    def far(tensors: Tensors) -> float:
        return max(float((before[n] - t).abs().max()) for n, t in tensors.items())

    assert min(map(far, messages.values())) > 1e-3  # What was sent had been taught.
    assert far(after) < 1e-6


def test_fused_equals_sequential(bert_folder: Path) -> None:
    runs = []
    for engine in ({}, {"engine": Trainer}):
        settings: dict[str, Any] = {"watermark": DUW(**FEW, epochs=4), "space": ADAPTER, "rounds": 1, **engine}
        runs.append(sent(bert_folder, **settings)[2][0])
    for one, other in zip(runs[0].values(), runs[1].values(), strict=True):
        assert max(float((one[n] - other[n]).abs().max()) for n in one) < 1e-4


def test_what_it_does_not_go_with() -> None:
    with pytest.raises(Incompatible, match="DUW marks a copy of the weights for each client, but Scaffold sends"):
        MARK.fits(Scaffold(), None)
    with pytest.raises(Incompatible, match="a round, which Buffered does not have"):
        MARK.fits(FedAvg(), Buffered())
    with pytest.raises(RecipeError, match="DUW beta must be at least 0, but is -1"):
        DUW(beta=-1)
