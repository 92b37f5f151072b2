"""FedMD: scores of public rows travel, weights do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedfm.core.client import View, work
from fedfm.core.jobs import Fit, Fitted, Job, Predict
from fedfm.core.mean import WeightedMean
from fedfm.core.method import State
from fedfm.core.space import Layout
from fedfm.core.update import Kind, Member, Update
from fedfm.errors import FedfmError, Incompatible, RecipeError
from fedfm.federation import Federation
from fedfm.methods.distill.fedmd import FedMD
from fedfm.rules import Add
from fedfm.spaces import LoRA
from fedfm.tasks import Classify
from fedfm.wire.codec import encode
from tests.conftest import FAST, People

Make = Callable[..., Federation]


def rows(word: str, label: int, n: int) -> list[dict[str, Any]]:
    return [{"text": f"{word} {i}", "label": label} for i in range(n)]


PUBLIC = rows("ha", 0, 2) + rows("no", 1, 2) + rows("mm", 2, 1)
PEOPLE = People(
    {
        name: {"train": rows(word, label, n), "validation": rows(word, label, 2), "test": rows(word, label, 2)}
        for name, word, label, n in (("ann", "ha", 0, 6), ("bob", "no", 1, 3), ("cid", "mm", 2, 4))
    }
)


@pytest.fixture
def make(bert_folder: Path) -> Make:
    def build(method: FedMD | None = None, **changes: Any) -> Federation:
        settings: dict[str, Any] = {
            "space": LoRA(r=2, lora_alpha=4),
            "training": FAST,
            "rounds": 2,
            "public": PUBLIC,
            **changes,
        }
        return Federation(str(bert_folder), method or FedMD(), PEOPLE, Classify(), **settings)

    return build


class Client:
    """Answers jobs with weights that count the fits, and notes what was asked."""

    def __init__(self, private: dict[str, torch.Tensor] | None = None) -> None:
        self.jobs: list[Job] = []
        self.view = View(Member("ann", 6), 1, private or {})

    def __call__(self, job: Job, client: View) -> Any:
        self.jobs.append(job)
        count = job.tensors.get("w", torch.zeros(1))
        if isinstance(job, Predict):
            return count.repeat(2, 3)
        return Fitted({"w": count + 1}, 2, 4, 0.5)


def test_the_first_round_learns_from_public_and_then_from_own_rows() -> None:
    client = Client()
    update = work(FedMD(transfer_steps=7), "local", client.view, {}, client)
    transfer, own, predict = client.jobs
    assert isinstance(transfer, Fit)
    assert (transfer.split, transfer.max_steps, transfer.criterion, dict(transfer.tensors)) == ("public", 7, None, {})
    assert isinstance(own, Fit)
    assert (own.split, own.max_steps, own.tensors["w"].item()) == ("train", None, 1.0)
    assert isinstance(predict, Predict)
    assert (predict.split, predict.tensors["w"].item()) == ("public", 2.0)
    assert client.view.kept is not None
    assert client.view.kept["w"].item() == 2.0
    assert (list(update.tensors), update.weight, update.kind) == (["scores"], 1.0, Kind.KNOWLEDGE)


def test_later_rounds_digest_and_revisit() -> None:
    client = Client({"w": torch.tensor([5.0])})
    work(FedMD(digest_steps=3), "local", client.view, {"scores": torch.zeros(2, 3)}, client)
    digest, revisit, predict = client.jobs
    assert isinstance(digest, Fit)
    assert (digest.split, digest.max_steps, digest.tensors["w"].item()) == ("public", 3, 5.0)
    assert digest.criterion is not None
    assert isinstance(revisit, Fit)
    assert (revisit.split, revisit.criterion, revisit.tensors["w"].item()) == ("train", None, 6.0)
    assert predict.tensors["w"].item() == 7.0
    assert len({transfer.purpose for transfer in client.jobs[:2]}) == 2  # type: ignore[attr-defined]


def test_who_comes_late_learns_first_and_digests_then() -> None:
    client = Client()
    work(FedMD(), "local", client.view, {"scores": torch.zeros(2, 3)}, client)
    assert [(type(job).__name__, getattr(job, "split", "")) for job in client.jobs] == [
        ("Fit", "public"),
        ("Fit", "train"),
        ("Fit", "public"),
        ("Fit", "train"),
        ("Predict", "public"),
    ]
    fits = [job for job in client.jobs if isinstance(job, Fit)]
    assert len({fit.purpose for fit in fits}) == 4
    assert [fit.criterion is None for fit in fits] == [True, True, False, True]


def test_the_digest_loss_by_hand() -> None:
    client = Client({"w": torch.ones(1)})
    consensus = torch.tensor([[0.0, 0.0], [9.0, 9.0], [1.0, -1.0]])
    work(FedMD(), "local", client.view, {"scores": consensus}, client)
    criterion = client.jobs[0].criterion  # type: ignore[attr-defined]
    # Positions 2 and 0: (|2 - 1| + |0 + 1|) / 2 = 1 and (|3| + |-4|) / 2 = 3.5.
    logits = torch.tensor([[2.0, 0.0], [3.0, -4.0]], requires_grad=True)
    found = criterion(logits, torch.tensor([2, 0]))
    assert found.tolist() == [1.0, 3.5]
    found.sum().backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [[0.5, 0.5], [0.5, -0.5]]


def test_the_consensus_is_the_mean_of_all_scores() -> None:
    # Each client counts the same, whatever it holds: ((1, 2) + (3, 6) + (5, 1)) / 3 = (3, 3); the old one is gone.
    method = FedMD()
    state = State({"scores": torch.full((1, 2), 99.0)})
    updates = [
        Update({"scores": torch.tensor([row])}, weight=1.0, kind=Kind.KNOWLEDGE)
        for row in ([1.0, 2.0], [3.0, 6.0], [5.0, 1.0])
    ]
    after = method.apply(state, method.combine(state, updates, WeightedMean()), Add(0.5))
    assert after.weights["scores"].tolist() == [[pytest.approx(3.0), pytest.approx(3.0)]]
    weighted = [replace(update, weight=w) for update, w in zip(updates, (1.0, 2.0, 1.0), strict=True)]
    assert method.combine(state, weighted, WeightedMean()).tensors["scores"].tolist() == [[3.0, pytest.approx(3.75)]]
    assert method.message(after, Member("ann", 1)) == after.weights


def test_what_travels(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make()
    sent: list[Update] = []
    combine = FedMD.combine

    def noted(self: FedMD, state: State, updates: Any, mean: Any) -> Update:
        sent.extend(updates := list(updates))
        return combine(self, state, updates, mean)

    monkeypatch.setattr(FedMD, "combine", noted)
    outcome = run.run()
    assert len(sent) == 6
    for update in sent:
        assert {n: tuple(t.shape) for n, t in update.tensors.items()} == {"scores": (len(PUBLIC), 3)}
        header = len(encode(replace(update, tensors={"scores": torch.zeros(0, 3)}, metrics={})))
        assert len(encode(replace(update, metrics={}))) == pytest.approx(len(PUBLIC) * 3 * 4 + header, abs=16)
    assert {n: tuple(t.shape) for n, t in outcome.state.weights.items()} == {"scores": (len(PUBLIC), 3)}
    assert torch.allclose(outcome.state.weights["scores"], sum(u.tensors["scores"] for u in sent[3:]) / 3)
    assert run.result(outcome.state) == {}
    assert outcome.records[0]["shared_parameters"] == 0


def test_scores_are_those_of_the_client_s_own_model(make: Make, tmp_path: Path) -> None:
    run = make(rounds=1)
    outcome = run.run(tmp_path / "run")
    from fedfm.store.clients import ClientStore

    store = ClientStore(tmp_path / "run/clients")
    own = {client: store.get(client) for client in run.ids}
    rows = [run.trainer.answer(Predict(own[c], split="public"), View(Member(c, 1), 1)) for c in run.ids]
    assert torch.allclose(outcome.state.weights["scores"], sum(rows) / 3, atol=1e-5)  # type: ignore[arg-type]
    assert not torch.allclose(rows[0], rows[1], atol=1e-3)
    losses = {c: v["loss"] for c, v in outcome.records[1]["validation"]["clients"].items()}
    assert len(set(losses.values())) == 3


def test_digesting_brings_clients_together(make: Make) -> None:
    """With many steps towards the consensus, the scores of clients lie closer to it than without."""
    spread = {}
    for steps in (1, 40):
        run = make(FedMD(digest_steps=steps), training=replace(FAST, max_steps=4))
        method, state = run.method, State({"scores": 3 * torch.eye(3)[[0, 1, 2, 0, 1]]})
        updates = [
            work(method, "local", View(m, 2, space=run.layout), method.message(state, m), run.trainer.answer)
            for m in map(run.plan.members.member, run.ids)
        ]
        spread[steps] = sum(float((u.tensors["scores"] - state.weights["scores"]).abs().mean()) for u in updates)
    assert spread[40] < spread[1]


def test_without_public_rows(make: Make) -> None:
    with pytest.raises(FedfmError, match="no public rows"):
        make(public=(), rounds=3, evaluation=None).run()


def test_it_is_about_classes(federation: Make) -> None:
    with pytest.raises(Incompatible, match="FedMD is defined on the task classify, not on chat"):
        federation(FedMD())


@pytest.mark.parametrize("name", ["transfer_steps", "digest_steps"])
def test_bad_settings(name: str) -> None:
    with pytest.raises(RecipeError, match=f"FedMD {name} must be at least 0, but is -1"):
        FedMD(**{name: -1})


def test_nothing_is_known_at_the_start() -> None:
    assert FedMD().start(Layout({"w": torch.zeros(1)})).weights == {}
