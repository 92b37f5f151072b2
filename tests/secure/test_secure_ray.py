"""Secure aggregation with Ray workers: secrets stay in one process, and numbers are the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")
pytest.importorskip("tenseal")

from fedfm.core.update import Tensors
from fedfm.errors import BadUpdate
from fedfm.evaluate import Evaluation
from fedfm.links.transcript import Transcript
from fedfm.methods.lora.fedit import FedIT
from fedfm.sample import Poisson
from fedfm.secure.ckks import CKKS
from fedfm.secure.fedml_he import FedMLHE
from fedfm.secure.fixed_point import FixedPoint
from fedfm.secure.secagg import SecAgg
from fedfm.train import Fused
from fedfm.wire import AdaptiveClip, Clip, DistributedGaussian, Gaussian
from tests.links import test_ray
from tests.links.test_ray import Nearby, Tiny, check_resume, same, tiny
from tests.secure.test_secure_flower import sizeless
from tests.secure.test_secure_runs import HALF, Half

Make = Callable[..., Tiny]
__all__ = ["tiny"]
QUIET = {"evaluation": Evaluation(every=0), "rounds": 2}
PLANS: dict[str, dict[str, Any]] = {
    "secagg": {"secure": HALF},
    "noise": {"secure": HALF, "stages": (Clip(0.5), DistributedGaussian(1.0, delta=1e-3))},
    "bits": {
        "secure": SecAgg(threshold=0.5, max_value=0.5, max_weight=1),
        "stages": (AdaptiveClip(0.05), Gaussian(0.1, delta=1e-3)),
        "sampler": Poisson(rate=1.0),
    },
    "ckks": {"secure": CKKS()},
    "fedml-he": {"secure": FedMLHE(ratio=0.3)},
}


@pytest.fixture(autouse=True)
def plans(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, changes in PLANS.items():
        monkeypatch.setitem(test_ray.PLANS, name, (Half(), {**QUIET, **changes}))
    monkeypatch.setitem(test_ray.PLANS, "odd", (Odd(), {**QUIET, "rounds": 1, "secure": HALF}))


class Odd(FedIT):
    """One client has a weight that cannot be summed."""

    def local(self, client: Any, message: Tensors) -> Any:
        update = yield from super().local(client, message)
        return replace(update, weight=0.5) if client.member.id == "bob" else update


@pytest.mark.parametrize("plan", PLANS)
def test_ray_is_bit_equal_to_one_process(tiny: Make, tmp_path: Path, plan: str) -> None:
    [here], [there] = tiny(plan)().values(), tiny(plan)().values()
    alone = here.run(tmp_path / "alone")
    with Nearby({there.method.id: there}, tiny(plan, copy=1), tiny(plan, copy=2)) as nearby:
        spread = there.run(tmp_path / "spread")
    assert alone.records[2]["secure"]["summed"] == 3
    # How far a ciphertext can be packed is chance.
    encrypted = plan in ("ckks", "fedml-he")
    records = [sizeless(outcome.records) if encrypted else outcome.records for outcome in (alone, spread)]
    assert same(replace(alone, records=records[0]), replace(spread, records=records[1]))
    # Only the method's own task travels: of three clients, twice.
    assert nearby.sizes == [1] * 6


def test_no_secret_reaches_a_worker(tiny: Make, tmp_path: Path) -> None:
    [made] = tiny("ckks")().values()
    names: list[str] = []

    class Looking(Nearby):
        def send(self, content: Any) -> str:
            for record in content.values():
                names.extend(str(value) for value in record.values())
            return super().send(content)

    with Looking({made.method.id: made}, tiny("ckks", copy=1)):
        made.run(tmp_path / "run")
    assert any("lora_B" in name for name in names)
    assert not any("secure:" in name for name in names)


def test_clients_trained_together_are_hidden_one_by_one(tiny: Make) -> None:
    [alone], [there] = tiny("secagg")().values(), tiny("secagg", trainer=Fused)().values()
    with Nearby({there.method.id: there}, *(tiny("secagg", trainer=Fused, copy=copy) for copy in (1, 2))) as nearby:
        together = there.run()
    step = FixedPoint(24, 1.0, 1).step
    for name, tensor in alone.run().state.weights.items():
        assert (together.state.weights[name] - tensor).abs().max() <= 1e-5 + 2 * step
    assert nearby.sizes == [2, 1, 2, 1]


def test_what_the_server_is_given_is_masked(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    [made] = tiny("secagg")().values()
    heard: list[tuple[str, list[str], float]] = []
    note = Transcript._note

    def listening(self: Transcript, phase: str, round: int, message: Tensors, reply: Any) -> None:
        heard.append((phase, sorted(reply.update.tensors), reply.update.weight))
        note(self, phase, round, message, reply)

    monkeypatch.setattr(Transcript, "_note", listening)
    with Nearby({made.method.id: made}, tiny("secagg", copy=1)):
        made.run()
    assert [(names, weight) for phase, names, weight in heard if phase == "local"] == [(["secure:masked"], 0.0)] * 6
    assert {phase for phase, *_ in heard} == {"secure/keys", "secure/shares", "local", "secure/unmask"}


def test_a_resumed_run_is_bit_equal(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(test_ray.PLANS, "secagg", (Half(), {**QUIET, **PLANS["secagg"], "rounds": 3}))
    made = tiny("secagg")()
    with Nearby(made, tiny("secagg", copy=1)):
        check_resume(next(iter(made.values())), tmp_path)


def test_what_cannot_be_summed_drops_its_client(tiny: Make, tmp_path: Path) -> None:
    [here], [there] = tiny("odd")().values(), tiny("odd")().values()
    with Nearby({there.method.id: there}, tiny("odd", copy=1)):
        spread = there.run(tmp_path / "spread")
    [dropped] = spread.records[1]["dropped"]
    assert dropped["client"] == "bob"
    assert dropped["reason"].startswith("its weight 0.5 is no whole number")
    assert same(here.run(tmp_path / "alone"), spread)


def test_without_its_keys_a_client_sends_nothing(tiny: Make) -> None:
    [made] = tiny("secagg")().values()
    with Nearby({made.method.id: made}, tiny("secagg", copy=1)):
        link: Any = made.connect(test_ray.ClientStore())
        [reply] = link.ask("local", 1, {made.plan.members.member("ann"): made.start().weights})
    assert reply.update is None
    assert reply.reason.startswith("it has no keys for secure aggregation in round 1")
    with pytest.raises(BadUpdate, match="it has no keys"):
        link.near.worker.hidden("local", 1, made_update("ann"))


def made_update(member: str) -> Any:
    from fedfm.core.update import Update

    return Update({}, 1.0, member=member)
