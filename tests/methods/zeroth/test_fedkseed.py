"""FedKSeed: what travels does not grow with the model, and says exactly what it became."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedfm.core.client import View, work
from fedfm.core.jobs import Fitted, Job, Loss, Scores
from fedfm.core.mean import WeightedMean
from fedfm.core.space import Layout
from fedfm.core.update import Kind, Member, Update
from fedfm.errors import Incompatible, RecipeError
from fedfm.federation import Federation
from fedfm.methods.zeroth.fedkseed import FedKSeed
from fedfm.rules import Add
from fedfm.spaces import Full
from fedfm.tasks import Classify
from fedfm.train import zeroth
from fedfm.train.zeroth import At, Descend
from fedfm.wire.codec import encode
from tests.conftest import FAST, People

Make = Callable[..., Federation]


def test_by_hand() -> None:
    # K = 3; ann (n = 6) went 0.3 along z_0, bob (n = 3) 0.6 along z_1: c = (1, 0, 2) + (6 * 0.3, 3 * 0.6, 0) / 9.
    method = FedKSeed(seeds=3)
    state = replace(method.start(Layout({})), weights={"coefficients": torch.tensor([1.0, 0.0, 2.0])})
    gone = {"ann": [0.3, 0.0, 0.0], "bob": [0.0, 0.6, 0.0]}

    def answer(job: Job, client: View) -> Fitted:
        assert isinstance(job, Descend)
        assert job.coefficients.tolist() == [1.0, 0.0, 2.0]
        assert job.epsilon == 5e-4
        return Fitted({"coefficients": torch.tensor(gone[client.member.id])}, 1, 1, 2.0)

    members = [Member("ann", 6), Member("bob", 3)]
    updates = [work(method, "local", View(m, 1), method.message(state, m), answer) for m in members]
    assert all((u.kind, list(u.tensors)) == (Kind.KNOWLEDGE, ["coefficients"]) for u in updates)
    state = method.apply(state, method.combine(state, updates, WeightedMean()), Add())
    assert state.weights["coefficients"].tolist() == pytest.approx([1.2, 0.2, 2.0])


def test_scoring_happens_at_the_coefficients() -> None:
    def answer(job: Job, client: View) -> Scores:
        assert isinstance(job, At)
        assert isinstance(job.job, Loss)
        assert (job.coefficients.tolist(), job.job.split) == ([4.0], "validation")
        return Scores(torch.zeros(2), torch.ones(2), {"loss": torch.tensor(1.0)})

    update = work(
        FedKSeed(seeds=1), "validate", View(Member("ann", 1), 0), {"coefficients": torch.tensor([4.0])}, answer
    )
    assert update.weight == 2


def sizes(federation: Federation) -> tuple[int, int, int]:
    """Bytes up and down without metrics, parameters of the model."""
    method, state = federation.method, federation.start()
    member = federation.plan.members.member(federation.ids[0])
    message = method.message(state, member)
    update = work(method, "local", View(member, 1, space=federation.layout), message, federation.trainer.answer)
    parameters = sum(p.numel() for p in federation.bench.space.parameters.values())
    return len(encode(replace(update, metrics={}))), len(encode(Update(message))), parameters


def test_bytes_do_not_depend_on_the_model(federation: Make, bert_folder: Path, people: People) -> None:
    labelled = People({c: {s: [{"text": c, "label": 1}] * 6 for s in splits} for c, splits in people.data.items()})
    llama = sizes(federation(FedKSeed(), space=Full()))
    bert = sizes(Federation(str(bert_folder), FedKSeed(), labelled, Classify(), space=Full(), training=FAST))
    assert llama[2] != bert[2]
    assert llama[:2] == bert[:2]
    assert 4 * 4096 < llama[0] < 18_000
    assert 4 * 4096 < llama[1] < 18_000


def test_what_travels_is_recorded_so(federation: Make) -> None:
    record = federation(FedKSeed(), space=Full(), rounds=1).run().records[1]
    assert len(record["participants"]) == 3
    assert all(p["bytes_up"] < 18_000 and p["steps"] == 2 for p in record["participants"].values())
    assert record["bytes_down"] < 3 * 18_000


def test_the_mean_of_coefficients_is_the_mean_of_weights(federation: Make) -> None:
    run = federation(FedKSeed(seeds=8), space=Full(), training=replace(FAST, max_steps=6, learning_rate=1e-3))
    method, trainer, state = run.method, run.trainer, run.start()
    for round in (1, 2):  # from the initial weights, then from others
        updates, finals = [], []
        for member in map(run.plan.members.member, run.ids):
            view = View(member, round, space=run.layout)
            updates.append(work(method, "local", view, method.message(state, member), trainer.answer))
            finals.append((member.examples, trainer.space.read()))
        state = method.apply(state, method.combine(state, updates, run.mean), run.rule)
    total = sum(n for n, _ in finals)
    moved_at_all = 0.0
    for name, tensor in method.result(state, run.layout).items():
        mean = sum(n / total * weights[name] for n, weights in finals)
        assert torch.allclose(tensor, mean, atol=1e-4)
        moved_at_all = max(moved_at_all, float((tensor - run.layout.initial[name]).abs().max()))
    assert moved_at_all > 1e-3


def test_clients_with_the_same_message_start_from_the_same_bits(
    federation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two machines, that is with nothing kept from the other."""
    starts: list[dict[str, torch.Tensor]] = []
    place = zeroth.Displaced.place

    def noted(self: Any, trainer: Any) -> None:
        place(self, trainer)
        starts.append(trainer.space.read())

    monkeypatch.setattr(zeroth.Displaced, "place", noted)
    message = {"coefficients": torch.tensor([0.1, -0.3, 0.2, 0.0])}
    for client in ("ann", "bob"):
        run = federation(FedKSeed(seeds=4), space=Full())
        work(run.method, "local", View(run.plan.members.member(client), 1), message, run.trainer.answer)
    assert all(torch.equal(t, starts[1][n]) for n, t in starts[0].items())


def test_the_server_holds_no_weights_and_the_saved_model_is_the_trained_one(federation: Make, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    run = federation(FedKSeed(seeds=4), space=Full(), rounds=1)
    outcome = run.run(tmp_path / "run")
    assert {n: t.shape for n, t in outcome.state.weights.items()} == {"coefficients": (4,)}
    expected = run.result(outcome.state)
    assert not all(torch.equal(t, run.layout.initial[n]) for n, t in expected.items())
    saved = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "run/final").named_parameters())
    assert all(torch.equal(t, saved[n]) for n, t in expected.items())


def test_the_scored_model_is_the_result(federation: Make) -> None:
    run = federation(FedKSeed(seeds=4), space=Full(), rounds=1)
    outcome = run.run()
    member = run.plan.members.member("ann")
    scores = run.trainer.answer(Loss(run.result(outcome.state), split="validation"), View(member, 1))
    loss = float(scores.loss.sum() / scores.count.sum())
    assert outcome.records[1]["validation"]["clients"]["ann"]["loss"] == pytest.approx(loss, rel=1e-6)


def test_it_learns(federation: Make) -> None:
    """40 steps a client along 8 directions: no great progress, but progress."""
    training = replace(FAST, max_steps=40, per_device_train_batch_size=6, learning_rate=1e-4)
    records = federation(FedKSeed(seeds=8), space=Full(), training=training, rounds=2).run().records
    losses = [record["validation"]["global"]["loss"] for record in records]
    assert losses[2] < losses[1] < losses[0]


def test_bad_settings() -> None:
    with pytest.raises(RecipeError, match="FedKSeed seeds must be at least 1, but is 0"):
        FedKSeed(seeds=0)
    with pytest.raises(RecipeError, match="FedKSeed epsilon must be above 0 and finite, but is 0"):
        FedKSeed(epsilon=0)


def test_it_is_defined_on_all_parameters(federation: Make) -> None:
    with pytest.raises(Incompatible, match="space full, not on lora"):
        federation(FedKSeed())
