"""Data sharing: own rows and shared rows, as if the shared ones were the client's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fedfm.core.client import View, work
from fedfm.core.jobs import Fit, Fitted, Job
from fedfm.core.update import Member
from fedfm.errors import FedfmError
from fedfm.federation import Federation
from fedfm.methods.data.data_sharing import DataSharing
from fedfm.methods.fedavg import FedAvg
from tests.conftest import FAST, People, dialogue

Make = Callable[..., Federation]
PUBLIC = [dialogue("ha 1?", "haha!"), dialogue("no 2?", "nonono!"), dialogue("mm 3?", "mm!")]


def test_the_job_and_the_weight() -> None:
    # Trained to 3 from 1: a change of 2; the weight is that of the client's own five examples.
    def answer(job: Job, client: View) -> Fitted:
        assert isinstance(job, Fit)
        assert job.split == "train+public"
        return Fitted({"w": torch.tensor([3.0])}, 4, 8, 0.5)

    update = work(DataSharing(), "local", View(Member("ann", 5), 1), {"w": torch.tensor([1.0])}, answer)
    assert update.tensors["w"].tolist() == [2.0]
    assert update.weight == 5
    assert dict(update.metrics) == {"loss": 0.5, "steps": 4, "examples": 8}


def test_it_is_fedavg_on_clients_that_own_the_shared_rows(federation: Make, people: People) -> None:
    # With one client its weight does not matter: sharing equals owning, bit for bit. Enough steps to see every row.
    training = type(FAST)(max_steps=6, per_device_train_batch_size=2, learning_rate=1e-2)
    alone = people.only("bob")
    owning = People({"bob": {**alone.data["bob"], "train": [*alone.data["bob"]["train"], *PUBLIC]}})
    shared = federation(DataSharing(), members=alone, public=PUBLIC, training=training).run()
    owned = federation(FedAvg(), members=owning, training=training).run()
    plain = federation(FedAvg(), members=alone, training=training).run()
    assert all(torch.equal(shared.state.weights[n], t) for n, t in owned.state.weights.items())
    assert not all(torch.equal(shared.state.weights[n], t) for n, t in plain.state.weights.items())


def test_all_clients_see_the_same_shared_rows(federation: Make) -> None:
    made = federation(DataSharing(), public=PUBLIC)
    own = {id: len(made.trainer.encoded(id, "train")) for id in made.ids}
    for id in made.ids:
        both = made.trainer.encoded(id, "train+public")
        assert len(both) == own[id] + 3
        assert all(a is b for a, b in zip(both[own[id] :], made.trainer.encoded("", "public"), strict=True))


def test_weights_are_those_of_the_clients_own_rows(federation: Make) -> None:
    participants = federation(DataSharing(), public=PUBLIC, rounds=1).run().records[1]["participants"]
    assert {id: p["weight"] for id, p in participants.items()} == {"ann": 6, "bob": 3, "cid": 4}


def test_without_shared_rows_the_run_says_what_to_do(federation: Make) -> None:
    with pytest.raises(FedfmError, match=r"there are no public rows\. Give the run some"):
        federation(DataSharing(), rounds=4).run()
