"""Asynchronous schedules over clients that take their own time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")
from flwr.app import Message

from fedfm.evaluate import Evaluation
from fedfm.federation import Federation
from fedfm.links.flower import MemoryGrid, Node, Roll, client_app, over
from fedfm.links.worker import Worker
from fedfm.methods.asynchronous.fedasync import FedAsync
from fedfm.methods.asynchronous.fedbuff import FedBuff
from fedfm.observe import Observer
from fedfm.store.clients import ClientStore
from fedfm.train import Trainer
from tests.conftest import People

Make = Callable[..., Federation]


class Slow(MemoryGrid):
    """Answers of some nodes arrive only after so many answers of others."""

    def __init__(self, app: Any, members: Any, late: Mapping[int, int]) -> None:
        super().__init__(app, members)
        self.late = dict(late)
        self.waiting: list[tuple[int, Message]] = []
        self.passed = 0

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = set(message_ids)
        for entry in self.waiting:
            due, message = entry
            if due <= self.passed and message.metadata.reply_to_message_id in wanted:
                self.waiting.remove(entry)
                return [message]
        came = list(super().pull_messages(wanted))
        for reply in came:
            node, train = reply.metadata.src_node_id, reply.metadata.message_type == "train"
            if train and node in self.late:
                self.waiting.append((self.passed + self.late[node], reply))
                return []
            self.passed += train
        return came


@pytest.fixture
def deployed(
    federation: Make, people: People, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Federation, Slow]]:
    """A federation whose clients have their own trainers, behind a grid on which some are late."""
    monkeypatch.setattr("fedfm.links.flower.roll.PAUSE_S", 0.0)

    def make(method: Any, late: Mapping[int, int], **changes: Any) -> tuple[Federation, Slow]:
        settings = {"engine": Trainer, "evaluation": Evaluation(every=0), **changes}
        nodes = {}
        for name in people.ids:
            own = federation(method, members=people.only(name), **settings)
            worker = Worker(own.method, own.trainer, ClientStore(), layout=own.layout)
            nodes[name] = Node(people.member(name), worker, ClientStore())
        grid = Slow(client_app(lambda context: nodes[context.node_config["client"]]), people.ids, late)
        roll = Roll(grid)
        roll.wait(3)
        return federation(method, members=roll, link=over(grid, roll), **settings), grid

    return make


def test_the_server_acts_on_the_first_uploads_and_weighs_late_ones_by_their_age(
    deployed: Callable[..., tuple[Federation, Slow]],
) -> None:
    made, _ = deployed(FedBuff(buffer=1, concurrency=3), {1: 2}, rounds=6)
    records = made.run().records[1:]
    came = [(s["client"], s["staleness"]) for r in records for s in r["staleness"]]
    # ann's answer passes only after two of others: it began at version 0.
    assert came[0][0] != "ann"
    assert came[0][1] == 0
    assert next(age for client, age in came if client == "ann") >= 2
    assert all("simulated_time" not in r for r in records)
    assert [r["version"] for r in records] == [1, 2, 3, 4, 5, 6]


def test_too_old_uploads_are_dropped_and_named(deployed: Callable[..., tuple[Federation, Slow]]) -> None:
    made, _ = deployed(FedBuff(buffer=1, concurrency=3, max_staleness=1), {1: 2}, rounds=6)
    records = made.run().records[1:]
    dropped = [d for r in records for d in r["dropped"]]
    assert {d["client"] for d in dropped} == {"ann"}
    assert all(d["reason"].startswith("stale: ") for d in dropped)
    assert not any(s["client"] == "ann" for r in records for s in r["staleness"])


def test_fedasync_mixes_each_upload_as_it_comes(deployed: Callable[..., tuple[Federation, Slow]]) -> None:
    made, _ = deployed(FedAsync(concurrency=2), {2: 1}, rounds=5)
    records = made.run().records[1:]
    assert [len(r["staleness"]) for r in records] == [1] * 5
    assert {s["staleness"] for r in records for s in r["staleness"]} >= {0, 1}


def test_what_was_in_flight_is_begun_again_when_a_run_goes_on(
    deployed: Callable[..., tuple[Federation, Slow]], tmp_path: Path
) -> None:
    made, _ = deployed(FedBuff(buffer=1, concurrency=3), {1: 10**6}, rounds=4)

    class Quit(Observer):
        def round_finished(self, record: Mapping[str, Any]) -> None:
            if record["round"] == 2:
                made.stop()

    assert made.run(tmp_path / "run", observers=[Quit()]).status == "stopped"
    again, _ = deployed(FedBuff(buffer=1, concurrency=3), {}, rounds=4)
    records = again.run(tmp_path / "run", resume=True).records
    assert [r["round"] for r in records] == [0, 1, 2, 3, 4]
    # ann began at version 0, before the loss.
    assert {"client": "ann", "staleness": 2} in [s for r in records[3:] for s in r["staleness"]]
