"""Secure aggregation over Flower: the same numbers, the same private state, in Flower's own messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")
pytest.importorskip("tenseal")

from fedfm.evaluate import Evaluation
from fedfm.federation import Federation
from fedfm.links.flower import InMemoryFlower
from fedfm.links.inprocess import InProcess
from fedfm.links.node import Node
from fedfm.links.tickets import NEVER, alike
from fedfm.links.worker import Worker
from fedfm.methods.lora.fedit import FedIT
from fedfm.observe import Observer
from fedfm.secure.ckks import CKKS
from fedfm.secure.fedml_he import FedMLHE
from fedfm.secure.secagg_plus import SecAggPlus
from fedfm.secure.secure import Secure
from fedfm.store.clients import ClientStore
from fedfm.train import Trainer
from fedfm.wire import Clip, DistributedGaussian
from tests.links.outcome import files, timeless
from tests.secure.test_secure_runs import HALF, Half, Losing, crowd, same

Make = Callable[..., Federation]


@pytest.fixture
def federation(federation: Make) -> Make:
    return lambda method, **changes: federation(
        method, **{"engine": Trainer, "evaluation": Evaluation(every=0), "secure": HALF, **changes}
    )


def sizeless(value: Any) -> Any:
    """Records without bytes: how far a ciphertext can be packed is chance."""
    if isinstance(value, dict):
        return {k: sizeless(v) for k, v in value.items() if "bytes" not in k and k not in ("expansion", "values")}
    return [sizeless(v) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("secure", [HALF, SecAggPlus(), CKKS(), FedMLHE()], ids=lambda part: part.id)
def test_flower_is_bit_equal_to_in_process(federation: Make, tmp_path: Path, secure: Secure) -> None:
    here = federation(Half(), secure=secure).run(tmp_path / "here")
    there = federation(Half(), secure=secure, link=InMemoryFlower).run(tmp_path / "there")
    assert same(here.state.weights, there.state.weights)
    told = sizeless if isinstance(secure, CKKS) else dict.copy
    assert [told(r) for r in timeless(here.records)] == [told(r) for r in timeless(there.records)]
    assert files(tmp_path / "here/clients") == files(tmp_path / "there/clients")
    assert files(tmp_path / "here/clients")


def test_noise_in_the_sum_is_that_of_in_process(federation: Make) -> None:
    changes: dict[str, Any] = {"stages": (Clip(0.5), DistributedGaussian(1.0, delta=1e-3))}
    here, there = (federation(Half(), **changes, link=link).run() for link in (InProcess, InMemoryFlower))
    assert same(here.state.weights, there.state.weights)
    assert timeless(here.records) == timeless(there.records)


def test_private_state_is_stored_before_the_checkpoint(federation: Make, tmp_path: Path) -> None:
    made = federation(Half(), link=InMemoryFlower, rounds=3)
    kept: list[int] = []

    class Look(Observer):
        def round_finished(self, record: Mapping[str, Any]) -> None:
            kept.append(len(list((tmp_path / "run/clients").rglob(f"{record['round']:08}.safetensors"))))

    made.run(tmp_path / "run", observers=[Look()])
    assert kept == [0, 3, 3, 3]


@pytest.mark.parametrize("secure", [HALF, FedMLHE()], ids=lambda part: part.id)
def test_drop_outs_and_resume_are_those_of_in_process(federation: Make, tmp_path: Path, secure: Secure) -> None:
    method, people = Losing(lost=("c1",)), crowd(5)
    here = federation(method, members=people, rounds=3, secure=secure).run()
    first = federation(method, members=people, rounds=3, link=InMemoryFlower, secure=secure)

    class Quit(Observer):
        def round_finished(self, record: Mapping[str, Any]) -> None:
            if record["round"] == 1:
                first.stop()

    assert first.run(tmp_path / "run", observers=[Quit()]).status == "stopped"
    again = federation(method, members=people, rounds=3, link=InMemoryFlower, secure=secure)
    there = again.run(tmp_path / "run", resume=True)
    assert same(here.state.weights, there.state.weights)
    assert sizeless(timeless(here.records)) == sizeless(timeless(there.records))


def test_a_node_refuses_tasks_of_another_or_of_no_protocol(federation: Make) -> None:
    made = federation(FedIT())
    worker = Worker(made.method, made.trainer, ClientStore(), **made.shared)
    node = Node(made.plan.members.member("ann"), worker)
    task = {"phase": "secure/keys", "round": 1, "client": "ann", "accepted": NEVER, "ticket": (1, 1), "order": []}
    shared = (made.method, made.stages, made.seed, True)
    empty = b"\x02\x00\x00\x00\x00\x00\x00\x00{}"

    def reason(**changes: Any) -> str:
        return node.work({**task, **alike(*shared, made.secure), **changes}, empty)[0]["reason"]

    assert reason() == ""
    other = repr(replace(HALF, bits=8))
    assert reason(secure=other) == f"its secure is {HALF!r}, but the server's is {other}"
    assert reason(secure="None") == f"its secure is {HALF!r}, but the server's is None"
    open_ = Worker(made.method, made.trainer, ClientStore(), **{**made.shared, "secure": None})
    node = Node(made.plan.members.member("ann"), open_)
    assert reason(secure="None") == "FedIT has no task 'secure/keys'"
