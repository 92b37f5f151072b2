"""Flower carries what the in-process link carries: the same numbers, the same drops, in real Flower types."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

pytest.importorskip("flwr")
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.serverapp import Grid

from fedfm.core import trees
from fedfm.core.method import Client, Method, Work
from fedfm.core.traits import Trait, Traits
from fedfm.core.update import Member, Tensors, Update
from fedfm.errors import ClientError, DataError, Stopped, StoreError
from fedfm.evaluate import Evaluation
from fedfm.federation import Federation
from fedfm.links import flower
from fedfm.links.flower import (
    FlowerLink,
    InMemoryFlower,
    MemoryGrid,
    Node,
    Roll,
    client_app,
    over,
    server_app,
)
from fedfm.links.flower import roll as flower_roll
from fedfm.links.link import Reply
from fedfm.links.tickets import NEVER
from fedfm.links.worker import Worker
from fedfm.methods.fedavg import FedAvg
from fedfm.methods.local_only import LocalOnly
from fedfm.methods.lora.fedit import FedIT
from fedfm.observe import Observer
from fedfm.store.clients import ClientStore
from fedfm.train import Fused, Trainer
from fedfm.wire import Clip
from fedfm.wire.admit import Limits
from tests.conftest import People
from tests.links.outcome import files, timeless

Make = Callable[..., Federation]
SOURCES = Path(flower.__file__).parents[2]


def same(a: Tensors, b: Tensors) -> bool:
    return list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)


# Whole runs.


@pytest.fixture
def federation(federation: Make) -> Make:
    """Clients train one at a time, as each does alone on its own machine."""
    return lambda method, **changes: federation(method, **{"engine": Trainer, **changes})


@dataclass(frozen=True)
class Half(FedIT):
    """A stays with the client, B travels."""

    share: ClassVar[trees.Patterns] = ("lora_B",)
    traits: ClassVar[Traits] = FedIT.traits - {Trait.FORGETFUL}


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        (FedIT(), {}),
        (FedAvg(), {"stages": (Clip(max_norm=0.01),), "seed": 3}),
        (LocalOnly(), {"rounds": 3}),
        (Half(), {}),
    ],
    ids=["fedit", "fedavg-clip", "local-only", "half"],
)
def test_flower_is_bit_equal_to_in_process(
    federation: Make, tmp_path: Path, method: Method, changes: dict[str, Any]
) -> None:
    steps: list[list[int]] = [[], []]

    class Pace(Observer):
        def __init__(self, told: list[int]) -> None:
            self.told = told

        def stepped(self, steps: int) -> None:
            self.told.append(steps)

    first, second = federation(method, **changes), federation(method, link=InMemoryFlower, **changes)
    here = first.run(tmp_path / "here", observers=[Pace(steps[0])])
    there = second.run(tmp_path / "there", observers=[Pace(steps[1])])
    assert same(here.state.weights, there.state.weights)
    assert timeless(here.records) == timeless(there.records)
    assert steps[0] == steps[1]
    scores = [
        made.assess(run.state, "test", ClientStore(tmp_path / place / "clients"))
        for made, run, place in ((first, here, "here"), (second, there, "there"))
    ]
    assert scores[0] is not None
    assert scores[0] == scores[1]
    kept = files(tmp_path / "here/clients")
    assert kept == files(tmp_path / "there/clients")
    assert bool(kept) == (Trait.FORGETFUL not in method.traits)


def test_flower_equals_clients_trained_together(federation: Make) -> None:
    together = federation(FedIT(), engine=Fused).run().state.weights
    apart = federation(FedIT(), engine=Fused, link=InMemoryFlower).run().state.weights
    for name, tensor in together.items():
        torch.testing.assert_close(apart[name], tensor, rtol=0, atol=1e-5)


def test_a_resumed_run_is_bit_equal(federation: Make, tmp_path: Path) -> None:
    whole = federation(Half(), link=InMemoryFlower, rounds=3).run(tmp_path / "whole")
    half = federation(Half(), link=InMemoryFlower, rounds=3)

    class Quit(Observer):
        def round_finished(self, record: Mapping[str, Any]) -> None:
            if record["round"] == 2:
                half.stop()

    assert half.run(tmp_path / "half", observers=[Quit()]).status == "stopped"
    resumed = federation(Half(), link=InMemoryFlower, rounds=3).run(tmp_path / "half", resume=True)
    assert same(whole.state.weights, resumed.state.weights)
    assert files(tmp_path / "whole/clients") == files(tmp_path / "half/clients")


@dataclass(frozen=True)
class Misbehaving(Half):
    """Bob does not do as he is told."""

    deed: str = "memory"

    def local(self, client: Client, message: Tensors) -> Work:
        update = yield from super().local(client, message)
        if client.member.id != "bob":
            return update
        if self.deed == "memory":
            raise MemoryError("cannot allocate")
        if self.deed == "defect":
            raise ZeroDivisionError("by nought")
        return replace(update, tensors={n: t * float("nan") for n, t in update.tensors.items()})


@pytest.mark.parametrize(
    ("deed", "reason"), [("memory", "MemoryError: cannot allocate"), ("nan", "is not finite")], ids=str
)
def test_a_failing_client_is_dropped_and_named_equally(
    federation: Make, tmp_path: Path, deed: str, reason: str
) -> None:
    here = federation(Misbehaving(deed=deed)).run(tmp_path / "here")
    there = federation(Misbehaving(deed=deed), link=InMemoryFlower).run(tmp_path / "there")
    assert timeless(here.records) == timeless(there.records)
    [dropped] = there.records[1]["dropped"]
    assert dropped["client"] == "bob"
    assert reason in dropped["reason"]
    # A refused update leaves no private state behind.
    kept = files(tmp_path / "there/clients")
    assert kept == files(tmp_path / "here/clients")
    assert {name.partition("/")[0] for name in kept} == {"ann", "cid"}


def test_a_defect_of_the_method_ends_the_run(federation: Make) -> None:
    with pytest.raises(ClientError, match=r"'bob', round 1, task 'local', job none: ZeroDivisionError: by nought"):
        federation(Misbehaving(deed="defect"), link=InMemoryFlower).run()


def test_a_late_client_is_dropped_and_a_stop_is_heard(federation: Make) -> None:
    late = federation(FedIT(), link=InMemoryFlower, rounds=1, limits=Limits(timeout_s=1e-9))
    assert "late" in late.run().records[1]["dropped"][0]["reason"]
    made = federation(FedIT(), link=InMemoryFlower, evaluation=Evaluation(every=0))
    link = made.reach(ClientStore(), made.trainer)
    made.stop()
    with pytest.raises(Stopped):
        list(link.ask("local", 1, dict.fromkeys(map(made.plan.members.member, made.ids), made.bench.space.initial)))


def test_nodes_with_their_own_model_and_rows_by_a_server_app(federation: Make, people: People, tmp_path: Path) -> None:
    """As deployed: the server has no rows, each node its own trainer and folder."""
    settings = {"evaluation": Evaluation(every=1), "rounds": 2}
    here = federation(Half(), **settings)
    outcome = here.run(tmp_path / "here")
    nodes = {}
    for name in people.ids:
        own = federation(Half(), members=people.only(name), **settings)
        worker = Worker(own.method, own.trainer, ClientStore(tmp_path / name), layout=own.layout)
        nodes[name] = Node(people.member(name), worker, ClientStore(tmp_path / f"{name}-pending"))
    grid = MemoryGrid(client_app(lambda context: nodes[context.node_config["client"]]), people.ids)
    seen: list[Federation] = []

    def make(roll: Roll, link: type[FlowerLink], context: Context) -> Federation:
        assert [roll.member(i).examples for i in roll.ids] == [6, 3, 4]
        seen.append(federation(Half(), members=roll, link=link, **settings))
        return seen[0]

    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={})
    server_app(make, least=3, folder=tmp_path / "there")(grid, context)
    there = [line for line in (tmp_path / "there/metrics.jsonl").read_text().splitlines() if line]
    assert timeless(outcome.records) == timeless([json.loads(line) for line in there])
    for name in people.ids:
        assert files(tmp_path / "here/clients" / name) == files(tmp_path / name / name)
    with pytest.raises(DataError, match="own machine"):
        seen[0].plan.members.rows("ann", "train")
    with pytest.raises(DataError, match="pool"):
        seen[0].plan.members.pooled()


# The link by itself, with a method that needs no model.


@dataclass(frozen=True)
class Count(Method):
    """Each client counts its admitted tasks and sends the number beside what it received."""

    traits: ClassVar[Traits] = Method.traits - {Trait.FORGETFUL}
    fails: str = ""

    def local(self, client: Client, message: Tensors) -> Work:
        if client.member.id == self.fails:
            raise ZeroDivisionError("by nought")
        count = client.private.get("n", torch.zeros(1)) + 1
        client.keep({"n": count})
        yield from ()
        return Update({**message, "n": count}, weight=2.5, metrics={"loss": 0.5})

    def validate(self, client: Client, message: Tensors) -> Work:
        client.keep({"n": torch.full((1,), 99.0)})  # In vain: scores are not admitted.
        yield from ()
        return Update({"n": client.private.get("n", torch.zeros(1))})


@dataclass
class Setup:
    """Nodes with stores of their own, and a grid between them and any number of links."""

    method: Method = field(default_factory=Count)
    grid_type: type[MemoryGrid] = MemoryGrid
    ids: tuple[str, ...] = ("ann", "bob")
    folder: Path | None = None

    def __post_init__(self) -> None:
        self.nodes = {}
        for name in self.ids:
            place = self.folder and self.folder / name
            trainer: Any = SimpleNamespace(group=1, pulse=None)
            worker = Worker(self.method, trainer, ClientStore(place))
            self.nodes[name] = Node(Member(name, 5), worker, ClientStore(place and place / "pending"))
        self.grid = self.grid_type(client_app(lambda c: self.nodes[c.node_config["client"]]), self.ids)
        self.members = [Member(name, 5) for name in self.ids]

    def link(self, store: ClientStore | None = None, method: Method | None = None, **changes: Any) -> FlowerLink:
        return over(self.grid)(method or self.method, None, store or ClientStore(), **changes)

    def counts(self) -> list[float]:
        """What is stored for good."""
        stored = [self.nodes[name].worker.store.get(name) for name in self.ids]
        return [float(s["n"]) if s else 0.0 for s in stored]

    def ask(
        self,
        link: FlowerLink,
        round: int,
        message: Tensors | None = None,
        accept: str = "ann bob",
        close: bool = True,
    ) -> list[Reply]:
        replies = []
        for reply in link.ask("local", round, {m: message or {} for m in self.members}):
            replies.append(reply)
            if reply.update is not None and reply.member.id in accept:
                reply.accept()
        if close:
            link.close()
        return replies


def test_tensors_survive_in_type_value_and_order() -> None:
    setup = Setup()
    sent = {
        "z": torch.randn(3, 2).to(torch.bfloat16),
        "b": torch.randn(4).to(torch.float8_e4m3fn),
        "a": torch.arange(3),
        "m": torch.zeros(0, 2),
        "layers.10": torch.tensor(1.5),
        "layers.2": torch.randn(2, 3).t(),
    }
    reply = setup.ask(setup.link(), 1, sent)[0]
    assert reply.update is not None
    assert list(reply.update.tensors) == [*sent, "n"]
    for name, tensor in sent.items():
        came = reply.update.tensors[name]
        assert (came.dtype, came.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(came.float(), tensor.float())
    assert (reply.update.member, reply.update.weight, dict(reply.update.metrics)) == ("ann", 2.5, {"loss": 0.5})


class Spy(MemoryGrid):
    """Notes what passes."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.sent: list[Message] = []
        self.came: list[Message] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        self.sent += list(messages)
        return super().push_messages(self.sent[-len(list(messages)) :])

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        came = list(super().pull_messages(message_ids))
        self.came += came
        return came


def test_messages_are_flowers_own_and_bytes_are_counted_as_they_travel() -> None:
    setup = Setup(grid_type=Spy)
    arrived, task = [], setup.nodes["ann"].task
    setup.nodes["ann"].task = lambda *given: (arrived.append(given), task(*given))[1]  # type: ignore[method-assign]
    replies = setup.ask(setup.link(), 1, {"w": torch.ones(7)})
    grid: Any = setup.grid
    assert isinstance(grid, Grid)
    kinds = [m.metadata.message_type for m in grid.sent]
    assert kinds == ["query.hello"] * 2 + ["train"] * 2 + ["query.settle"] * 2
    down, up = grid.sent[2], grid.came[2]
    assert isinstance(down, Message)
    assert isinstance(up, Message)
    assert isinstance(down.content["task"], ConfigRecord)
    for message, record, size in ((down, "down", replies[0].bytes_down), (up, "up", replies[0].bytes_up)):
        arrays = message.content[record]
        assert isinstance(arrays, ArrayRecord)
        assert isinstance(arrays["bytes"], Array)
        assert (arrays["bytes"].dtype, arrays["bytes"].stype) == ("uint8", "fedfm")
        assert size == len(arrays["bytes"].data) == arrays["bytes"].shape[0]
    # What arrives was made again from Flower's bytes.
    [(settings, data)] = arrived
    assert data is not down.content["down"]["bytes"].data
    assert data == down.content["down"]["bytes"].data
    assert settings == dict(down.content["task"])
    # One set of tensors for all is packed once.
    assert grid.sent[2].content["down"] is grid.sent[3].content["down"]


def test_one_reply_at_a_time_is_held() -> None:
    setup = Setup(grid_type=Spy)
    replies = setup.link().ask("local", 1, {m: {} for m in setup.members})
    next(replies)
    assert len([m for m in setup.grid.came if m.metadata.message_type == "train"]) == 1  # type: ignore[attr-defined]


def tampered(change: Callable[[RecordDict], Any]) -> type[MemoryGrid]:
    """A grid on which bob's replies to tasks are changed."""

    class Tampering(MemoryGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            replies = list(super().pull_messages(message_ids))
            for reply in replies:
                if reply.metadata.src_node_id == 2 and reply.metadata.message_type == "train":
                    change(reply.content)
            return replies

    return Tampering


def _garbage(data: bytes) -> Callable[[RecordDict], Any]:
    return lambda content: content["up"].update({"bytes": Array("uint8", (len(data),), "fedfm", data)})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_garbage(b"not an update at all"), "do not begin like an update"),
        (_garbage(b"FFM1\xff\xff\xff\xff"), "the header claims 4294967295 bytes"),
        (lambda c: c.pop("up"), "not one of fedfm: KeyError"),
        (lambda c: c.pop("done"), "not one of fedfm: KeyError"),
        (lambda c: c.update({"up": ConfigRecord({"bytes": b"FFM1"})}), "not one of fedfm: AttributeError"),
        (lambda c: c["done"].update({"order": [5, 6]}), "the order of its tensors"),
        (lambda c: c["done"].update({"order": [0, 0]}), "the order of its tensors"),
        (lambda c: c["done"].update({"order": 3}), "not one of fedfm: TypeError"),
        (lambda c: c["done"].update({"seconds": float("nan")}), "it claims 0 steps in nan s"),
        (lambda c: c["done"].update({"seconds": float("inf")}), "it claims 0 steps in inf s"),
        (lambda c: c["done"].update({"steps": -1}), "it claims -1 steps"),
        (lambda c: c["done"].update({"steps": "many"}), "not one of fedfm: ValueError"),
        (lambda c: c["done"].update({"status": "excellent"}), "it failed"),
    ],
)
def test_garbage_from_a_client_drops_it(change: Callable[[RecordDict], Any], reason: str) -> None:
    setup = Setup(grid_type=tampered(change))
    ann, bob = setup.ask(setup.link(), 1, {"w": torch.ones(2)})
    assert ann.update is not None
    assert bob.update is None
    assert reason in bob.reason
    assert setup.counts() == [1, 0]


def test_a_remote_client_cannot_end_the_run_with_a_defect() -> None:
    setup = Setup(Count(fails="bob"))
    ann, bob = setup.ask(setup.link(), 1)
    assert ann.update is not None
    assert (bob.update, bob.reason) == (None, "ZeroDivisionError: by nought")


def test_an_error_of_flower_drops_the_client() -> None:
    class Broken(MemoryGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            return [
                Message(Error(2, "Traceback ...\nValueError: broken"), reply_to=_asked(reply))
                if (reply.metadata.src_node_id, reply.metadata.message_type) == (2, "train")
                else reply
                for reply in super().pull_messages(message_ids)
            ]

    def _asked(reply: Message) -> Message:
        envelope = reply.metadata
        asked = setup.grid.create_message(RecordDict(), "train", envelope.src_node_id, "")
        asked.metadata.__dict__["_message_id"] = envelope.reply_to_message_id
        return asked

    setup = Setup(grid_type=Broken)
    ann, bob = setup.ask(setup.link(), 1)
    assert ann.update is not None
    assert (bob.update, bob.reason) == (None, "Flower error 2: ValueError: broken")


def test_who_does_not_answer_is_late_and_who_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Deaf(MemoryGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            return [
                reply
                for reply in super().pull_messages(message_ids)
                if (reply.metadata.src_node_id, reply.metadata.message_type) != (1, "train")
            ]

    monkeypatch.setattr(flower_roll, "PAUSE_S", 0)
    setup = Setup(grid_type=Deaf)
    setup.members.append(Member("zoe", 1))
    now = iter(range(0, 10**6, 7))
    ann, bob, zoe = setup.ask(setup.link(timeout_s=30.0, clock=lambda: float(next(now))), 1)
    assert (ann.update, ann.reason) == (None, "late: no answer in 90 s")
    assert bob.update is not None
    assert (zoe.update, zoe.reason) == (None, "no Flower node speaks for it")


def test_another_recipe_or_an_unknown_task_is_refused() -> None:
    setup = Setup()
    ann, _ = setup.ask(setup.link(seed=7), 1)
    assert (ann.update, ann.reason) == (None, "its seed is 0, but the server's is 7")
    ann, _ = setup.ask(setup.link(method=FedAvg(weighting="clients")), 1)
    assert "its method is Count(fails='')" in ann.reason
    [reply] = setup.link().ask("start", 1, {setup.members[0]: {}})
    assert (reply.update, reply.reason) == (None, "Count has no task 'start'")


def test_steps_are_told_when_a_reply_comes() -> None:
    setup = Setup(grid_type=tampered(lambda c: c["done"].update({"steps": 4})))
    told: list[int] = []
    setup.ask(setup.link(on_step=told.append), 1)
    assert told == [0, 4]


# Private state, when either side forgets.


def test_private_state_is_stored_when_the_next_task_comes_or_the_run_ends_and_only_where_it_was_admitted() -> None:
    setup = Setup()
    link = setup.link()
    setup.ask(link, 1, accept="ann", close=False)
    assert setup.counts() == [0, 0]
    list(link.ask("validate", 0, {m: {} for m in setup.members}))
    assert setup.counts() == [1, 0]
    replies = setup.ask(link, 2)
    assert [float(r.update.tensors["n"]) for r in replies if r.update] == [2, 1]
    assert setup.counts() == [2, 1]


def test_a_lost_settlement_is_made_up_by_the_next_task() -> None:
    class Lossy(MemoryGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            first = next(m for i, m in self._waiting.items() if i in set(message_ids))
            if first.metadata.message_type == "query.settle":
                self._waiting.pop(first.metadata.message_id)
                return [Message(Error(8, "crashed"), reply_to=first)]
            return super().pull_messages(message_ids)

    setup = Setup(grid_type=Lossy)
    link = setup.link()
    setup.ask(link, 1)
    assert setup.counts() == [0, 0]
    assert len(list(setup.link().ask("validate", 0, {m: {} for m in setup.members}))) == 2
    replies = setup.ask(link, 2, accept="")
    assert [float(r.update.tensors["n"]) for r in replies if r.update] == [2, 2]
    assert setup.counts() == [1, 1]


@pytest.mark.parametrize("restarted", [False, True])
def test_a_server_that_lost_a_round_takes_its_clients_back(tmp_path: Path, restarted: bool) -> None:
    """Rounds 1 to 3 were admitted, the checkpoint of round 2 is the last: round 3 is done again, from 2 tasks."""
    setup = Setup(folder=tmp_path / "nodes")
    ledger = ClientStore(tmp_path / "ledger")
    link = setup.link(ledger)
    for round in (1, 2, 3):
        setup.ask(link, round)
    assert setup.counts() == [3, 3]
    ledger.rewind(2)
    if restarted:  # The nodes forget all that is not on disk, too.
        setup = Setup(folder=tmp_path / "nodes")
    replies = setup.ask(setup.link(ledger), 3)
    assert [float(r.update.tensors["n"]) for r in replies if r.update] == [3, 3]
    assert setup.counts() == [3, 3]


def test_versions_to_which_no_server_goes_back_are_deleted(tmp_path: Path) -> None:
    setup = Setup(folder=tmp_path)
    link = setup.link()
    for round in range(1, 6):
        setup.ask(link, round)
    # Round 5 is not checkpointed yet; should the checkpoint of 4 be broken, that of 3 is the last.
    assert sorted(p.stem for p in (tmp_path / "ann/ann").glob("*")) == ["00000003", "00000004", "00000005"]


def test_a_client_that_lost_its_state_says_so(tmp_path: Path) -> None:
    setup, ledger = Setup(), ClientStore(tmp_path)
    setup.ask(setup.link(ledger), 1)
    blank = Setup()
    ann, _ = blank.ask(blank.link(ledger), 2)
    assert ann.update is None
    assert ann.reason == "the private state that was accepted in round 1 is not on this client"


def test_scoring_the_untrained_model_neither_uses_nor_loses_private_state() -> None:
    setup = Setup()
    link = setup.link()
    setup.ask(link, 1)

    def scored(link: FlowerLink) -> list[float]:
        replies = link.ask("validate", 0, {m: {} for m in setup.members})
        return [float(r.update.tensors["n"]) for r in replies if r.update]

    assert scored(setup.link()) == [0, 0]  # A link with an empty store, as for the model before training.
    assert setup.counts() == [1, 1]
    assert scored(link) == [1, 1]
    assert setup.counts() == [1, 1]


def test_a_crash_of_the_client_between_storing_and_noting_is_harmless() -> None:
    setup = Setup()
    node = setup.nodes["ann"]
    node._note(NEVER, (1, 1), {"n": torch.ones(1)})
    node.worker.store.put("ann", 1, {"n": torch.ones(1)})  # Stored, then killed before the note.
    node.settle((1, 1))
    node.settle((1, 1))
    assert setup.counts()[0] == 1
    with pytest.raises(StoreError):
        node.settle((2, 2))


# Who is there.


def test_two_nodes_cannot_speak_for_one_member() -> None:
    setup = Setup()
    setup.grid.contexts[3] = replace(setup.grid.contexts[1], node_id=3)
    roll = Roll(setup.grid)
    with pytest.warns(UserWarning, match="node 3 takes no part: node 1 already speaks for 'ann'"):
        roll.wait(2)
    assert roll.nodes == {"ann": 1, "bob": 2}


def test_a_node_that_comes_back_under_another_number_is_found() -> None:
    setup = Setup()
    link = setup.link()
    setup.ask(link, 1)
    setup.grid.contexts[9] = setup.grid.contexts.pop(1)
    replies = setup.ask(link, 2)
    assert [r.reason for r in replies] == ["", ""]
    assert link.roll.nodes == {"ann": 9, "bob": 2}
    away = setup.grid.contexts.pop(9)
    ann, _ = setup.ask(link, 3)
    assert ann.reason == "its Flower node is gone"
    ann, _ = setup.ask(link, 3)
    assert ann.reason == "it has not answered since it was dropped: its Flower node is gone"
    setup.grid.contexts[9] = away
    assert [r.reason for r in setup.ask(link, 4)] == ["", ""]


def test_who_introduces_itself_badly_takes_no_part() -> None:
    setup = Setup()
    setup.nodes["bob"].member = Member("", 5)
    with pytest.warns(UserWarning, match="node 2 takes no part: it calls itself ''"):
        setup.ask(link := setup.link(), 1)
    assert link.roll.ids == ["ann"]


def test_profiles_arrive() -> None:
    setup = Setup()
    setup.nodes["ann"].member = Member("ann", 5, {"rank": 4, "memory_gb": 7.5})
    roll = Roll(setup.grid)
    roll.wait(2)
    assert dict(roll.member("ann").profile) == {"rank": 4.0, "memory_gb": 7.5}


# Where Flower is imported.


def test_flower_is_imported_in_one_folder_and_only_its_public_modules() -> None:
    found: dict[str, set[str]] = {}  # by folder
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                if name.split(".")[0] == "flwr":
                    found.setdefault(path.parent.name, set()).add(name)
    assert found == {"flower": {"flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.simulation"}}


def test_fedfm_does_not_load_flower() -> None:
    code = (
        "import sys, fedfm, fedfm.links, fedfm.federation; print([m for m in sys.modules if m.split('.')[0] == 'flwr'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"
