"""FedMA: blocks matched one after another."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fedfm.core.mean import WeightedMean
from fedfm.core.space import Layout
from fedfm.core.update import Member, Update
from fedfm.errors import Incompatible, RecipeError
from fedfm.federation import Federation
from fedfm.methods.fedavg import FedAvg
from fedfm.methods.merge.fedma import FedMA, Pass
from fedfm.methods.merge.matching import blocks
from fedfm.spaces import Full

INTO, BIAS, OUT = (
    "e.layer.0.intermediate.dense.weight",
    "e.layer.0.intermediate.dense.bias",
    "e.layer.0.output.dense.weight",
)


def test_a_permuted_client_is_matched_before_the_mean() -> None:
    # Two units, width 1. a: rows 1 and 5; b holds 5.2 and 1.2, that is the same units in the other order.
    start = {INTO: torch.zeros(2, 1), BIAS: torch.zeros(2), OUT: torch.zeros(1, 2), "head.weight": torch.zeros(1)}
    a = {INTO: [[1.0], [5.0]], BIAS: [0.0, 0.0], OUT: [[10.0, 20.0]], "head.weight": [2.0]}
    b = {INTO: [[5.2], [1.2]], BIAS: [0.0, 0.0], OUT: [[22.0, 12.0]], "head.weight": [4.0]}
    updates = [
        Update({n: torch.tensor(t) for n, t in one.items()}, weight=w, member=name)
        for name, one, w in (("a", a, 3.0), ("b", b, 1.0))
    ]
    method, state = FedMA(), Pass(start, round=1)
    found = method.combine(state, updates, WeightedMean()).tensors
    assert found[INTO].flatten().tolist() == pytest.approx([1.05, 5.05])
    assert found[OUT].flatten().tolist() == pytest.approx([10.5, 20.5])
    assert found["head.weight"].tolist() == pytest.approx([2.5])
    # In the round after the only block, nothing is matched: units meet by their place.
    plain = method.combine(Pass(start, round=2), updates, WeightedMean()).tensors
    assert plain[INTO].flatten().tolist() == pytest.approx([2.05, 4.05])


def test_a_matched_block_is_frozen_for_the_rest_of_the_pass(federation: Callable[..., Federation]) -> None:
    made = federation(FedMA(), space=Full(), rounds=3)
    states = [made.start().weights]
    for rounds in (1, 2, 3):
        states.append(federation(FedMA(), space=Full(), rounds=rounds).run().state.weights)
    first, second = blocks(states[0])

    def moved(stem: str, round: int) -> bool:
        names = [n for n in states[0] if n.startswith(stem + ".")]
        return any(not torch.equal(states[round - 1][n], states[round][n]) for n in names)

    assert [moved(first.stem, r) for r in (1, 2, 3)] == [True, False, False]
    assert [moved(second.stem, r) for r in (1, 2, 3)] == [True, True, False]
    others = [n for n in states[0] if not n.startswith((first.stem + ".", second.stem + "."))]
    assert all(any(not torch.equal(states[r - 1][n], states[r][n]) for n in others) for r in (1, 2, 3))


def test_with_one_client_it_is_fedavg_in_the_first_round(federation: Callable[..., Federation]) -> None:
    from tests.conftest import People, dialogue

    rows = [dialogue(f"ha {i}?", "ha!") for i in range(4)]
    alone = People({"ann": {"train": rows, "validation": rows, "test": rows}})
    mine, usual = (federation(m, space=Full(), rounds=1, members=alone).run().state for m in (FedMA(), FedAvg()))
    assert all(torch.allclose(t, usual.weights[n], atol=1e-6) for n, t in mine.weights.items())


def test_what_it_is_not_for_is_refused(federation: Callable[..., Federation]) -> None:
    with pytest.raises(Incompatible, match="defined on the space full"):
        federation(FedMA())
    with pytest.raises(RecipeError, match="this model has none"):
        FedMA().start(Layout({"h.0.mlp.c_fc.weight": torch.zeros(2, 2)}))
    with pytest.raises(RecipeError, match="sweeps must be at least 0, but is -1"):
        FedMA(sweeps=-1)


def test_the_round_is_known_to_server_and_clients_alike() -> None:
    state = FedMA().start(Layout({INTO: torch.zeros(2, 1), OUT: torch.zeros(1, 2)}))
    assert FedMA().message(state, Member("a", 1)) == state.weights
