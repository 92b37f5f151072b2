"""The greedy soup: what is kept, what is rejected, never worse than the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from fedfm.core.jobs import Job, Loss, Scores
from fedfm.core.mean import WeightedMean
from fedfm.core.space import Layout
from fedfm.core.update import Member, Tensors, Update
from fedfm.errors import NoUpdates, RecipeError
from fedfm.federation import Federation
from fedfm.methods.merge.model_soup_greedy import ModelSoupGreedy, Soup, greedy
from fedfm.rules import Add
from tests.conftest import dialogue

Make = Callable[..., Federation]
PUBLIC = [dialogue("ha 1?", "haha!"), dialogue("no 2?", "nonono!")]


@dataclass
class Toy:
    """A server that scores a model by its squared distance to the origin, over two rows of equal loss."""

    sent: Mapping[str, Sequence[float]]
    round: int = 1
    asked: list[Loss] = field(default_factory=list)

    mean = WeightedMean()
    rule = Add()
    space = Layout({})

    @property
    def members(self) -> tuple[Member, ...]:
        return tuple(Member(id, 10 * (i + 1)) for i, id in enumerate(self.sent))

    def ask(self, phase: str, messages: Mapping[Member, Tensors]) -> Iterator[Update]:
        for member in messages:
            yield Update({"w": torch.tensor(self.sent[member.id])}, member=member.id)

    def do(self, job: Job) -> Any:
        assert isinstance(job, Loss)
        assert job.split == "public"
        self.asked.append(job)
        loss = job.tensors["w"].double().square().sum()
        return Scores(torch.stack([loss, loss]), torch.tensor([1, 1]), {})


def soup(**sent: Sequence[float]) -> tuple[Soup, Toy]:
    toy = Toy(sent)
    state = ModelSoupGreedy().round(toy, Soup({"w": torch.zeros(2)}))
    assert isinstance(state, Soup)
    return state, toy


def test_by_hand() -> None:
    # Losses alone: a 4, b 9, c 100. a is best. With b, (2 - 3)/2 = -0.5: 0.25, better than 4. With c too,
    # (2 - 3 + 10)/3 = 3: 9, worse than 0.25. So a and b stay, in equal parts.
    state, toy = soup(a=[2.0, 0.0], b=[-3.0, 0.0], c=[10.0, 0.0])
    assert state.kept == ("a", "b")
    assert state.weights["w"].tolist() == [-0.5, 0.0]
    # Every model alone, then every one but the best in turn: 3 + 2 evaluations.
    assert len(toy.asked) == 5


def test_it_goes_from_the_best_to_the_worst() -> None:
    # b (1) is first although it comes last in the list; then c: (1 - 2)/2 = -0.5, better; then a: (1 - 2 + 3)/3 = 0.67,
    # worse than 0.25.
    state, _ = soup(a=[3.0, 0.0], c=[-2.0, 0.0], b=[1.0, 0.0])
    assert state.kept == ("b", "c")


def test_what_does_not_change_the_score_stays() -> None:
    state, _ = soup(a=[1.0, 0.0], b=[1.0, 0.0], c=[-1.0, 0.0])
    assert state.kept == ("a", "b", "c")


def test_never_worse_than_the_best_and_the_mean_of_the_kept() -> None:
    for seed in range(30):
        g = torch.Generator().manual_seed(seed)
        sent = {id: (torch.randn(2, generator=g) + 0.5).tolist() for id in "abcde"}
        state, _ = soup(**sent)
        best = min(sum(x * x for x in w) for w in sent.values())
        assert float(state.weights["w"].square().sum()) <= best + 1e-6
        mean = torch.stack([torch.tensor(sent[id]) for id in state.kept]).mean(0)
        assert torch.allclose(state.weights["w"], mean, atol=1e-6)


def test_noise_is_rejected() -> None:
    honest = {id: [0.1 * i, -0.1 * i] for i, id in enumerate("abc")}
    state, _ = soup(**honest, noise=[50.0, -30.0])
    assert "noise" not in state.kept
    assert len(state.kept) >= 1


def test_a_model_whose_loss_is_no_number_goes_last() -> None:
    state, _ = soup(a=[math.nan, 0.0], b=[1.0, 0.0])
    assert state.kept == ("b",)


def test_the_selection_alone() -> None:
    assert greedy([], lambda kept: 0.0) == []
    assert greedy([5], lambda kept: 0.0) == [5]
    assert greedy([1, 2, 3], lambda kept: 0.0) == [1, 2, 3]
    assert greedy([1, 2, 3], lambda kept: -len(kept)) == [1]


def test_nobody_sent_anything() -> None:
    with pytest.raises(NoUpdates):
        soup()


def test_on_a_model_noise_is_left_out(federation: Make) -> None:
    """A client of the tiny Llama that sends large noise instead of what it learned."""

    @dataclass(frozen=True)
    class OneIsNoise(ModelSoupGreedy):
        def local(self, client: Any, message: Tensors) -> Any:
            update = yield from super().local(client, message)
            if client.member.id == "bob":
                noise = {n: torch.randn(t.shape, generator=client.draw(n)) for n, t in update.tensors.items()}
                return Update(noise, update.weight, update.metrics)
            return update

    made = federation(OneIsNoise(), rounds=3, public=PUBLIC)
    outcome = made.run()
    assert isinstance(outcome.state, Soup)
    assert "bob" not in outcome.state.kept
    assert outcome.state.kept
    assert [r["round"] for r in outcome.records] == [0, 1]


def test_rates_are_checked() -> None:
    with pytest.raises(RecipeError, match="rates must be"):
        ModelSoupGreedy(rates=(3.0, 0.3))
