"""Shapley values: of games by hand, and of clients' uploads."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice, permutations
from typing import Any

import numpy as np
import pytest
import torch

from fedfm.core.jobs import Job, Loss, Scores
from fedfm.core.mean import WeightedMean
from fedfm.core.method import Method, State
from fedfm.core.space import Layout
from fedfm.core.update import Update
from fedfm.errors import Incompatible, RecipeError
from fedfm.federation import Federation
from fedfm.methods.lora.fedsa_lora import FedSALoRA
from fedfm.rules import Add
from fedfm.value.gtg_shapley import GTGShapley, guided
from fedfm.value.shapley import exact, marginals, mean
from fedfm.wire import Clip, Gaussian
from tests.conftest import People, dialogue

Make = Callable[..., Federation]
PLAYERS = ["l", "m", "r"]


def gloves(coalition: frozenset[str]) -> float:
    """A pair of gloves is worth 1; l and m have a left one, r a right one."""
    return float("r" in coalition and bool(coalition & {"l", "m"}))


def drawn(seed: int = 0) -> Callable[[frozenset[str]], float]:
    """A game of random worths."""
    known: dict[frozenset[str], float] = {frozenset(): 0.0}
    draw = np.random.default_rng(seed)
    return lambda coalition: known.setdefault(coalition, float(draw.normal()))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_gloves_by_hand() -> None:
    # Of the 6 orders, l completes the pair only in (r, l, m): 1/6. So does m. r gets the rest.
    assert exact(PLAYERS, gloves) == pytest.approx({"l": 1 / 6, "m": 1 / 6, "r": 4 / 6})
    assert marginals(["r", "l", "m"], gloves, 1.0) == {"r": 0.0, "l": 1.0, "m": 0.0}
    assert marginals(["l", "m", "r"], gloves, 1.0) == {"l": 0.0, "m": 0.0, "r": 1.0}


def test_efficiency_symmetry_dummy_additivity() -> None:
    players = list("abcd")
    one, two = drawn(1), drawn(2)
    values = exact(players, one)
    assert sum(values.values()) == pytest.approx(one(frozenset(players)))
    both = exact(players, lambda s: one(s) + two(s))
    assert both == pytest.approx({p: values[p] + v for p, v in exact(players, two).items()})
    # d adds 3 whatever it joins; a and b are worth the same in any company.
    game = exact(players, lambda s: len(s & {"a", "b"}) ** 2 + 3.0 * ("d" in s))
    assert game == pytest.approx({"a": 2.0, "b": 2.0, "c": 0.0, "d": 3.0})


def test_all_orders_without_truncation_are_exact() -> None:
    players, game = list("abcd"), drawn(3)
    whole = game(frozenset(players))
    found = mean([marginals(order, game, whole) for order in permutations(players)])
    assert found == pytest.approx(exact(players, game))


def test_without_truncation_the_estimate_nears_the_exact_value() -> None:
    players, game = list("abcde"), drawn(4)
    audit = GTGShapley(round_truncation=0, order_truncation=0, tolerance=0, min_orders=20_000, max_orders=20_000)
    found, wanted = audit.values(players, game, rng()), exact(players, game)
    assert found == pytest.approx(wanted, abs=0.04)
    assert sum(found.values()) == pytest.approx(game(frozenset(players)))  # of each order, so of their mean


def test_every_client_leads_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = list(islice(guided(PLAYERS, rng()), 50))
    orders = [order for group in groups for order in group]
    assert Counter(order[0] for order in orders) == {"l": 50, "m": 50, "r": 50}
    assert all(sorted(order) == PLAYERS for order in orders)
    assert len({tuple(order) for order in orders}) == 6
    # Also where sampling ends: however many orders that takes, leads differ by 1 at most.
    seen: list[Sequence[str]] = []
    monkeypatch.setattr(
        "fedfm.value.gtg_shapley.marginals", lambda order, *rest: seen.append(order) or marginals(order, *rest)
    )
    GTGShapley(min_orders=31).values(list("abcd"), drawn(), rng())
    leads = Counter(order[0] for order in seen)
    assert len(seen) > 31
    assert max(leads.values()) - min(leads.values()) <= 1


def test_a_round_that_changed_little_adds_exactly_nothing() -> None:
    asked: list[frozenset[str]] = []

    def game(coalition: frozenset[str]) -> float:
        asked.append(coalition)
        return {0: 5.0, 1: 9.0, 2: -3.0, 3: 5.0005}[len(coalition)]

    assert GTGShapley(round_truncation=0.001).values(PLAYERS, game, rng()) == {"l": 0.0, "m": 0.0, "r": 0.0}
    assert sorted(map(len, asked)) == [0, 3]
    assert any(GTGShapley(round_truncation=0.0001, order_truncation=0.0).values(PLAYERS, game, rng()).values())


def test_an_order_ends_where_nothing_is_left() -> None:
    asked: list[frozenset[str]] = []

    def game(coalition: frozenset[str]) -> float:
        asked.append(coalition)
        return {0: 0.0, 1: 0.5, 2: 0.9995, 3: 1.0}[len(coalition)]

    added = marginals(["m", "r", "l"], game, 1.0, truncation=0.001)
    assert added == pytest.approx({"m": 0.5, "r": 0.4995, "l": 0.0})
    assert added["l"] == 0.0
    assert frozenset(PLAYERS) not in asked
    # What is left is 0.0005: with a truncation of just that, the order goes on.
    assert marginals(["m", "r", "l"], game, 1.0, truncation=0.0004)["l"] == pytest.approx(0.0005)


def test_each_coalition_is_asked_once() -> None:
    asked: Counter[frozenset[str]] = Counter()
    game = drawn(5)

    def counted(coalition: frozenset[str]) -> float:
        asked[coalition] += 1
        return game(coalition)

    GTGShapley(min_orders=60).values(list("abcd"), counted, rng())
    assert max(asked.values()) == 1
    assert 2 < len(asked) <= 16


def test_sampling_goes_on_until_the_estimate_stays() -> None:
    audit = GTGShapley(window=2, tolerance=0.05, min_orders=1, max_orders=1000)

    def found(*values: float) -> list[dict[str, float]]:
        return [{"a": value} for value in values]

    assert not audit.settled(found(1.0, 1.0), 1)  # no more than the window
    assert audit.settled(found(1.0, 1.0, 1.0), 1)
    # Running means 1, 1, 1.1: the last but one differs by 0.1 / 1.1 = 0.09 from the last.
    assert not audit.settled(found(1.0, 1.0, 1.3), 1)
    # 1, 1, 1.05: by 0.05 / 1.05 = 0.048.
    assert audit.settled(found(1.0, 1.0, 1.15), 1)
    assert not audit.settled(found(1.0, 1.0, 1.0), 5)  # fewer orders than clients
    assert audit.settled(found(*[0.0, 9.0] * 500), 1)  # the most there may be


def test_an_average_of_clients_decides_not_their_order_in_the_record() -> None:
    audit = GTGShapley(window=2, tolerance=0.05, min_orders=1)
    assert audit.settled([{"a": 1.0, "b": 5.0}, {"b": 5.0, "a": 1.0}, {"a": 1.0, "b": 5.0}], 1)


class Table:
    """A server whose public loss is a function of one weight."""

    def __init__(self, round: int = 1, seed: int = 0) -> None:
        self.round, self.members, self.mean, self.rule = round, (), WeightedMean(), Add()
        self.space = Layout({"w": torch.zeros(1)}, seed=seed)
        self.jobs: list[Loss] = []

    def ask(self, *args: Any) -> Any:
        raise AssertionError("an audit asks no client")

    def do(self, job: Job) -> Scores:
        assert isinstance(job, Loss)
        assert job.split == "public"
        self.jobs.append(job)
        # Two rows with 3 and 1 supervised positions: the mean loss is (w - 4)^2.
        square = (job.tensors["w"].double() - 4).square()
        return Scores(torch.cat([3 * square, square]), torch.tensor([3, 1]), {})


def sent(**deltas: tuple[float, float]) -> list[Update]:
    return [Update({"w": torch.tensor([d])}, weight=n, member=m) for m, (d, n) in deltas.items()]


def test_uploads_by_hand() -> None:
    # From w = 0: v() = -16. ann alone goes to 4: v = 0. bob alone to 0: v = -16. Both, weighted 3 : 1, to 3: v = -1.
    # ann: ((0 + 16) + (-1 + 16)) / 2 = 15.5; bob: (0 + (-1 - 0)) / 2 = -0.5; together 15 = -1 + 16.
    server = Table()
    audit = GTGShapley(order_truncation=0, min_orders=30)
    found = audit.look(server, Method(), State({"w": torch.zeros(1)}), sent(ann=(4.0, 3.0), bob=(0.0, 1.0)))
    assert found == pytest.approx({"ann": 15.5, "bob": -0.5})  # two clients: each order is met as often
    assert len(server.jobs) == 4


def test_the_state_before_is_the_start_and_stays_as_it_is() -> None:
    before = State({"w": torch.tensor([2.0])})
    # v() = -4; ann alone goes to 3: v = -1.
    found = GTGShapley().look(Table(), Method(), before, sent(ann=(1.0, 1.0)))
    assert found == pytest.approx({"ann": 3.0})
    assert before.weights["w"].tolist() == [2.0]


def test_equal_uploads_have_equal_values() -> None:
    updates = sent(ann=(1.0, 2.0), bob=(1.0, 2.0), cid=(6.0, 1.0), dan=(-1.0, 3.0))
    audit = GTGShapley(order_truncation=0, tolerance=0, min_orders=4000, max_orders=4000)
    found = audit.look(Table(), Method(), State({"w": torch.zeros(1)}), updates)
    assert found["ann"] == pytest.approx(found["bob"], abs=0.15)
    assert found["dan"] < found["ann"] < found["cid"]


def test_draws_are_those_of_the_round_and_not_of_the_order_of_uploads() -> None:
    updates = sent(ann=(1.0, 2.0), bob=(2.0, 1.0), cid=(6.0, 1.0), dan=(-1.0, 3.0))
    state, audit = State({"w": torch.zeros(1)}), GTGShapley(max_orders=30)
    first = audit.look(Table(), Method(), state, updates)
    assert audit.look(Table(), Method(), state, updates[::-1]) == first
    assert audit.look(Table(round=2), Method(), state, updates) != first
    assert audit.look(Table(seed=1), Method(), state, updates) != first


def test_nobody_came() -> None:
    assert GTGShapley().look(Table(), Method(), State({"w": torch.zeros(1)}), []) == {}


def test_a_method_without_a_global_model(federation: Make) -> None:
    with pytest.raises(Incompatible, match=r"GTGShapley needs GLOBAL .*, which FedSALoRA does not promise"):
        federation(FedSALoRA(), audits=(GTGShapley(),))


def test_in_a_run_the_client_whose_data_is_like_the_public_rows_is_worth_most(federation: Make, people: People) -> None:
    public = [dialogue(f"no {i}?", "no!") for i in range(4)]
    audit = GTGShapley(round_truncation=1e-6, order_truncation=1e-6)
    run = federation(Method(), audits=(audit,), public=public, rounds=2)
    records = run.run().records
    for record in records[1:]:
        values = record["gtg-shapley"]
        assert sorted(values) == people.ids
        assert all(math.isfinite(value) for value in values.values())
    assert max(records[1]["gtg-shapley"], key=records[1]["gtg-shapley"].get) == "bob"


def test_looking_changes_nothing(federation: Make) -> None:
    public = [dialogue("no?", "no!")]
    plain = federation(Method(), public=public).run()
    seen = federation(Method(), public=public, audits=(GTGShapley(),)).run()
    assert all(torch.equal(seen.state.weights[n], t) for n, t in plain.state.weights.items())


def test_it_needs_to_see_single_uploads(federation: Make) -> None:
    stages = (Clip(1.0), Gaussian(noise_multiplier=1.0))
    with pytest.raises(Incompatible, match=r"GTGShapley needs VISIBLE"):
        federation(Method(), audits=(GTGShapley(),), stages=stages)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"round_truncation": -1}, "round_truncation must be at least 0 and finite, but is -1"),
        ({"order_truncation": math.inf}, "order_truncation must be at least 0 and finite, but is inf"),
        ({"tolerance": math.nan}, "tolerance must be at least 0 and finite, but is nan"),
        ({"window": 0}, "window must be at least 1 order, but is 0"),
        ({"min_orders": 50, "max_orders": 40}, "but they are 50 and 40"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        GTGShapley(**settings)
