"""Catalogue properties of the optimisation methods and FedMA that the file of each does not check."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fedfm.core import trees
from fedfm.core.mean import WeightedMean
from fedfm.core.method import Method, State
from fedfm.core.update import Member, Update
from fedfm.federation import Federation
from fedfm.methods.fedavg import FedAvg
from fedfm.methods.merge.fedma import FedMA, Pass
from fedfm.methods.optim.fedavgm import FedAvgM
from fedfm.methods.optim.feddc import FedDC
from fedfm.methods.optim.feddyn import FedDyn
from fedfm.methods.optim.fednova import FedNova
from fedfm.methods.optim.fedpaq import FedPAQ
from fedfm.methods.optim.fedsgd import FedSGD
from fedfm.methods.optim.scaffold import Scaffold
from fedfm.rules import Add
from fedfm.wire.stage import Sender
from tests.methods.optim.quadratic import Quadratics, apart

COHORTS = (["a", "b"], ["b", "c"], ["a", "c"])


def three() -> Quadratics:
    return Quadratics({"a": (1.0, 0.0), "b": (-1.0, 1.0), "c": (3.0, -2.0)}, {"a": 4.0, "c": 2.0}, steps=5, rate=0.1)


def partly(round: int) -> list[str]:
    return COHORTS[round % 3]


@pytest.mark.parametrize("rounds", range(1, 8))
def test_feddyn_h_is_the_mean_of_all_g(rounds: int) -> None:
    clients = three()
    state = clients.run(FedDyn(), rounds, cohort=partly)
    mean = sum(t["w"] for t in clients.private.values()) / 3
    assert torch.allclose(state.drift["w"], mean, atol=1e-5)


@pytest.mark.parametrize("rounds", range(1, 8))
def test_scaffold_c_is_the_mean_of_all_c_k(rounds: int) -> None:
    clients = three()
    state = clients.run(Scaffold(), rounds, cohort=partly)
    assert torch.allclose(state.control["w"], sum(t["w"] for t in clients.private.values()) / 3, atol=1e-5)


def test_what_travels_beside_fedavg() -> None:
    sizes = {}
    for method in (FedAvg(), FedDyn(), Scaffold(), FedDC()):
        clients = apart()
        state = clients.run(method, 2)
        up = trees.nbytes(clients.ask(method, state, "a", 3).tensors)
        sizes[method.id] = up, trees.nbytes(method.message(state, Member("a", 1)))
    assert sizes == {"fedavg": (8, 8), "feddyn": (8, 8), "scaffold": (16, 16), "feddc": (16, 16)}


@pytest.mark.parametrize("method", [Scaffold(), FedDyn(alpha=1.0), FedDC(alpha=0.1)], ids=lambda m: m.id)
def test_the_optimum_is_found_with_part_of_the_clients(method: Method) -> None:
    clients = three()
    assert torch.allclose(clients.run(method, 150, cohort=partly).weights["w"], clients.optimum(), atol=1e-3)
    assert not torch.allclose(three().run(FedAvg(), 50).weights["w"], clients.optimum(), atol=0.01)


def test_feddc_drift_is_the_sum_of_own_changes() -> None:
    clients, method, moved = three(), FedDC(alpha=0.1), {}
    state = method.start(clients.layout)
    for round in range(1, 8):
        updates = []
        for id in partly(round):
            updates.append(clients.ask(method, state, id, round))
            moved[id] = moved.get(id, 0) + updates[-1].tensors["w"]
        state = method.apply(state, method.combine(state, updates, WeightedMean()), Add())
    assert all(torch.allclose(clients.private[id]["h:w"], total, atol=1e-6) for id, total in moved.items())
    assert torch.allclose(state.drift["w"], sum(moved.values()) / 3, atol=1e-6)


def test_feddc_without_penalty_begins_as_fedavg() -> None:
    clients = apart()
    first = [clients.ask(m, m.start(clients.layout), "a").tensors["w"] for m in (FedDC(alpha=0.0), FedAvg())]
    assert torch.equal(*first)


@pytest.mark.parametrize("mu", [0.0, 0.5])
def test_fednova_gap_falls_with_the_rate(mu: float) -> None:
    gaps = {}
    for method in (FedNova(mu=mu), FedAvg()):
        for rate, rounds in ((0.03, 30), (0.003, 300)):
            clients = Quadratics({"a": (1.0, 0.0), "b": (-1.0, 0.0)}, {"a": 2.0}, rate, {"a": 8, "b": 2})
            gaps[method.id, rate] = float((clients.run(method, rounds).weights["w"] - clients.optimum()).abs()[0])
    assert gaps["fednova", 0.03] / gaps["fednova", 0.003] == pytest.approx(10, rel=0.2)
    assert gaps["fedavg", 0.03] / gaps["fedavg", 0.003] < 1.2


def test_fedavgm_bit_for_bit_and_constant_change(federation: Callable[..., Federation]) -> None:
    one, other = (federation(m).run().state.weights for m in (FedAvgM(beta=0.0), FedAvg()))
    assert all(torch.equal(one[n], t) for n, t in other.items())
    rule, state = FedAvgM(beta=0.9).parts()["rule"], State({"w": torch.zeros(1)})
    for _ in range(200):
        before, state = state, Method().apply(state, Update({"w": torch.ones(1)}), rule)
    assert float(state.weights["w"] - before.weights["w"]) == pytest.approx(10.0, rel=1e-4)


def test_fedpaq_of_one_step_is_quantised_fedsgd_and_fine_levels_fedavg(federation: Callable[..., Federation]) -> None:
    clients = Quadratics({"a": (3.0, -1.0)}, rate=0.5)
    sent = []
    for method, scale in ((FedPAQ(), 1.0), (FedSGD(), 0.5)):
        update = clients.ask(method, method.start(clients.layout), "a")
        stage = FedPAQ(levels=3).parts()["stages"][0]
        back = stage.receive(stage.send(update, Sender(torch.Generator().manual_seed(3))), None)
        sent.append(scale * back.tensors["w"])
    assert torch.allclose(*sent)
    fine, exact = (federation(m).run().state.weights for m in (FedPAQ(levels=32767), FedAvg(weighting="clients")))
    assert max(float((fine[n] - t).abs().max()) for n, t in exact.items()) < 1e-4


def test_fedma_of_clients_in_one_order_is_fedavg() -> None:
    g = torch.Generator().manual_seed(0)
    shapes = {"intermediate.dense.weight": (6, 4), "intermediate.dense.bias": (6,), "output.dense.weight": (4, 6)}
    start = {f"e.layer.{i}.{n}": torch.randn(*s, generator=g) for i in (0, 1) for n, s in shapes.items()}
    updates = [
        Update({n: 0.01 * torch.randn(t.shape, generator=g) for n, t in start.items()}, weight=w)
        for w in (1.0, 2.0, 5.0)
    ]
    for round in (1, 2, 3):
        found = FedMA().combine(Pass(start, round=round), updates, WeightedMean()).tensors
        usual = FedAvg().combine(State(start), updates, WeightedMean()).tensors
        assert all(torch.allclose(found[n], t, atol=1e-6) for n, t in usual.items())
