"""What uploads tell of a client's rows as a whole."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from fedfm.audit import Case
from fedfm.audit.property.feature_leakage import WIDTH, FeatureLeakage, above, shares, sketched
from fedfm.audit.watch import Exposed
from fedfm.core.plan import Training
from fedfm.errors import RecipeError
from fedfm.methods.zeroth.fedkseed import FedKSeed
from fedfm.secure.secagg import SecAgg
from fedfm.spaces import Full
from fedfm.wire import Clip, LocalGaussian
from tests.audit.conftest import Make
from tests.conftest import People

ONE_STEP = Training(max_steps=1, per_device_train_batch_size=8, learning_rate=0.1, optim="sgd", max_grad_norm=0.0)
ATTACK = FeatureLeakage(field="hand", shadows=64)


def row(number: int, hand: str) -> dict[str, Any]:
    """A text in one of two hands, of a class that has nothing to do with it."""
    letters = "".join(random.Random(f"{number} {hand}").choices("abcdef", k=8))
    return {"text": letters.upper() if hand == "loud" else letters, "label": number % 3, "hand": hand}


def crowd(loud: dict[str, int]) -> People:
    """Clients of eight rows, of which so many are loud."""
    data: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for at, (name, count) in enumerate(loud.items()):
        rows = [row(100 * at + i, "loud" if i < count else "low") for i in range(8)]
        data[name] = {"train": rows, "validation": [], "test": []}
    return People(data)


PUBLIC = [row(5000 + i, hand) for i in range(40) for hand in ("loud", "low")]
PEOPLE = crowd({f"c{i}": (7, 1)[i % 2] for i in range(8)})


def audited(sorter: Make, **changes: Any) -> Case:
    settings = {"members": PEOPLE, "public": PUBLIC, "space": Full(), "training": ONE_STEP, "rounds": 1}
    return Case(sorter(**(settings | changes)), {})


def test_a_share_is_a_share() -> None:
    rows = [{"hand": "loud"}, {"hand": "low"}, {"hand": "loud"}, {"hand": "none of them"}]
    assert shares(rows, "hand", ["loud", "low", "odd"]) == [0.5, 0.25, 0.0]
    assert shares([], "hand", ["loud"]) == [0.0]


def test_who_has_more_than_the_median_client() -> None:
    has, counted = above(np.array([[0.9, 0.5, 0.0], [0.2, 0.5, 0.0], [0.1, 0.5, 1.0]]))
    assert has.tolist() == [[True, False, False], [False, False, False], [False, False, True]]
    # Of the second value all have as much.
    assert counted[0].tolist() == [True, False, True]


def test_a_sketch_is_linear_but_for_its_length_and_keeps_angles() -> None:
    draw = torch.Generator().manual_seed(0)
    one, other = ({"a": torch.randn(30, 40, generator=draw), "b": torch.randn(9, generator=draw)} for _ in range(2))

    def of(change: dict[str, torch.Tensor], seed: int = 0) -> np.ndarray:
        return sketched(Exposed(("x",), {}, change), seed)

    assert of(one).shape == (WIDTH,)
    assert np.linalg.norm(of(one)) == pytest.approx(1.0, abs=1e-5)
    assert of({n: 3 * t for n, t in one.items()}) == pytest.approx(of(one), abs=1e-6)
    both = of({n: one[n] + other[n] for n in one})
    flat = [torch.cat([t.flatten() for t in c.values()]) for c in (one, other)]
    assert float(both @ of(one)) == pytest.approx(
        float(torch.cosine_similarity(flat[0] + flat[1], flat[0], 0)), abs=0.1
    )
    assert abs(float(of(one) @ of(one, seed=1))) < 0.1
    left, right = ({"a": torch.full((4000,), x), "b": torch.full((4000,), 1 - x)} for x in (0.0, 1.0))
    assert abs(float(of(left) @ of(right))) < 0.1, "what has nothing in common stays so"
    assert not of({"a": torch.zeros(3)}).any()


def test_shadow_clients_are_made_of_the_servers_rows_alone(sorter: Make) -> None:
    people = ATTACK.people(audited(sorter), ["loud", "low"])
    assert len(people.ids) == 64
    own = {r["text"] for id in PEOPLE.ids for r in PEOPLE.rows(id, "train")}
    texts = {r["text"] for id in people.ids for r in people.rows(id, "train")}
    assert texts <= {r["text"] for r in PUBLIC}
    assert not texts & own
    assert {len(people.rows(id, "train")) for id in people.ids} == {8}
    mixed = {sum(r["hand"] == "loud" for r in people.rows(id, "train")) for id in people.ids}
    assert len(mixed) > 4


@pytest.fixture(scope="module")
def open_run(sorter: Make) -> Case:
    return audited(sorter)


def test_an_upload_tells_what_the_task_does_not_ask_for(open_run: Case) -> None:
    [found] = ATTACK.look(open_run)
    assert found.value > 0.9
    assert found.leaks
    assert found.measure == "AUC of the share of a hand"
    assert found.trials == 8, "who has more loud rows has fewer low ones"
    assert found.notes.startswith("8 clients, values of hand: 1;")
    clients, scores = ATTACK.scores(open_run, ["loud", "low"])
    assert clients == PEOPLE.ids
    assert scores.mean(0) == pytest.approx([0, 0], abs=1e-6)


@pytest.mark.parametrize(
    "protection",
    [{"stages": (Clip(0.1), LocalGaussian(1.0))}, {"secure": SecAgg()}],
    ids=["noise", "secagg"],
)
def test_protection_hides_it(sorter: Make, protection: dict[str, Any]) -> None:
    guarded = audited(sorter, **protection)
    [found] = ATTACK.look(guarded)
    assert not found.leaks
    if "secure" in protection:
        assert found.value == 0.5


def test_clients_with_equal_shares_have_nothing_to_tell(sorter: Make) -> None:
    alike = audited(sorter, members=crowd({f"c{i}": 4 for i in range(4)}))
    with pytest.raises(RecipeError, match="feature-leakage: all clients in round 1 have as much of each hand"):
        ATTACK.look(alike)


def test_where_it_cannot_be_carried_out(sorter: Make, open_run: Case) -> None:
    assert ATTACK.refusal(open_run) == ""
    assert "data.public: 0.2" in ATTACK.refusal(audited(sorter, public=[]))
    assert FeatureLeakage(field="foot").refusal(open_run) == "the server's rows have no field 'foot'"
    assert FeatureLeakage(field="text").refusal(open_run) == "the field 'text' has 80 values in the server's rows"
    assert "no change of weights" in ATTACK.refusal(Case(open_run.federation.like(FedKSeed()), {}))
    with pytest.raises(RecipeError, match="FeatureLeakage shadows must be at least 8, but is 2"):
        FeatureLeakage(shadows=2)
