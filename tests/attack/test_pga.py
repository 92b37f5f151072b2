"""PGA: up the loss, and no further than an honest client goes down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedfm.attack.pga import PGA, Ascend
from fedfm.attack.threat import Hostile
from fedfm.core import seeds, trees
from fedfm.core.jobs import Fit, Fitted, Gradient, Gradients, Job, Loss
from fedfm.core.space import Layout
from fedfm.core.update import Tensors
from fedfm.errors import Incompatible, RecipeError
from fedfm.federation import Federation
from fedfm.methods.fedavg import FedAvg
from fedfm.methods.zeroth.fedkseed import FedKSeed
from fedfm.models import load
from fedfm.robust import Median, NormBounding
from fedfm.spaces import Full, Prompt
from fedfm.train import Trainer
from fedfm.train.bench import Bench
from fedfm.wire.stage import Stage
from tests.attack.world import made
from tests.conftest import FAST


@dataclass
class Hill:
    """A trainer of two numbers whose loss has this slope, and who learns to go 3 down along the first."""

    slope: Callable[[Tensors], Tensors]
    steps: int = 4
    asked: list[Gradient] = field(default_factory=list)

    def answer(self, job: Job, client: Any) -> Any:
        if isinstance(job, Fit):
            return Fitted({"w": job.tensors["w"] - torch.tensor([3.0, 0.0]), "kept": torch.ones(1)}, self.steps, 8, 0.7)
        assert isinstance(job, Gradient)
        self.asked.append(job)
        return Gradients(self.slope(job.tensors), 0.0, 8)


CLIENT: Any = SimpleNamespace(space=Layout({"w": torch.zeros(2), "kept": torch.ones(1)}))


def climbed(hill: Hill, factor: float = 1.0, **given: Any) -> list[float]:
    job = Ascend({}, Fit({"w": torch.tensor([1.0, 1.0])}, train=("w",), **given), factor)
    fitted = job.run(hill, CLIENT)  # type: ignore[arg-type]
    assert (fitted.steps, fitted.examples, fitted.loss) == (hill.steps, 8, 0.7)
    assert fitted.tensors["kept"].tolist() == [1.0]
    return [float(x) for x in fitted.tensors["w"]]


def test_up_a_slope_as_far_as_the_honest_change() -> None:
    """The honest change is 3 long. Steps of 2 * 3 / 4 along (0.6, 0.8): two of them make 3, and two go no further."""
    hill = Hill(lambda at: {"w": torch.tensor([0.3, 0.4])})
    assert climbed(hill) == pytest.approx([1 + 1.8, 1 + 2.4])
    assert [asked.tensors["w"].tolist() for asked in hill.asked][:2] == [
        pytest.approx([1, 1]),
        pytest.approx([1.9, 2.2]),
    ]
    assert climbed(hill, factor=2.0) == pytest.approx([1 + 3.6, 1 + 4.8])


def test_on_the_ball_it_goes_round_to_the_highest_place() -> None:
    """The loss rises with the second number alone once the first is above 2: on a ball of 3 the end leans that way."""
    hill = Hill(lambda at: {"w": torch.tensor([1.0, 0.0] if float(at["w"][0]) < 2 else [0.0, 1.0])}, steps=20)
    x, y = climbed(hill)
    assert (x - 1) ** 2 + (y - 1) ** 2 == pytest.approx(9)
    assert y - 1 > x - 1


def test_a_flat_place_and_held_entries() -> None:
    assert climbed(Hill(lambda at: {"w": torch.zeros(2)})) == [1.0, 1.0]
    steep = Hill(lambda at: {"w": torch.tensor([5.0, 1.0])})
    assert climbed(steep, masks={"w": torch.tensor([False, True])}) == pytest.approx([1.0, 4.0])


def test_what_is_asked_is_what_the_method_trains() -> None:
    hill = Hill(lambda at: {"w": torch.ones(2)}, steps=1)
    climbed(hill, patches=({"p": torch.ones(1)},), blocks=(0, 1))
    [asked] = hill.asked
    assert (asked.train, asked.split, asked.blocks, len(asked.patches)) == (("w",), "train", (0, 1), 1)


def test_other_jobs_stay_as_they_are() -> None:
    who = Hostile("x", 0, 1, 0, seeds.generator(0))
    for job in (Loss({}), Fit({}, split="public")):
        assert PGA().job(job, who) is job
    assert isinstance(PGA().job(Fit({}), who), Ascend)


@pytest.fixture(scope="module")
def folder(bert_folder: Path) -> str:
    return str(bert_folder)


def lengths(bench: Bench, space: Any, threat: PGA | None, **changes: Any) -> tuple[dict[str, float], Any, Federation]:
    """How long each upload was, the state afterwards, and the federation."""
    found: dict[str, float] = {}

    @dataclass(frozen=True)
    class Look(Stage):
        def receive(self, update: Any, like: Any) -> Any:
            found[update.member] = trees.norm(update.tensors)
            return update

    federation = made(bench, space, threat=threat, stages=(Look(),), **changes)
    return found, federation.run().state, federation


def test_a_hostile_prompt_is_as_long_as_an_honest_one_and_worse(folder: str) -> None:
    space = Prompt(num_virtual_tokens=4)
    bench = Bench.of(load(folder, head="sequence_classification", num_labels=3), space, 0)
    before = {n: p.clone() for n, p in bench.loaded.model.named_parameters() if "prompt" not in n and "class" not in n}
    plain, _, _ = lengths(bench, space, None, rounds=1)
    turned, bad, federation = lengths(bench, space, PGA(clients=("c1",)), rounds=1)
    # In the first round all start from the same: the length is that of the honest change, and others' are the same.
    assert turned == pytest.approx(plain, rel=1e-4)
    assert set(bad.weights) == set(federation.layout.initial)
    assert all(torch.equal(t, dict(bench.loaded.model.named_parameters())[n]) for n, t in before.items())
    bounded, _, _ = lengths(bench, space, PGA(clients=("c1",), factor=3.0), rounds=1)
    assert bounded["c1"] == pytest.approx(3 * plain["c1"], rel=1e-4)


def loss(federation: Federation) -> float:
    found = federation.assess(federation.run().state)
    assert found is not None
    return found.pooled["loss"]


def test_a_boosted_one_spoils_the_mean_but_not_the_median(folder: str) -> None:
    bench = Bench.of(load(folder, head="sequence_classification", num_labels=3), Full(), 0)
    threat = PGA(clients=("c1",), factor=20.0)
    honest, spoilt, median, bounded = (
        loss(made(bench, Full(), rounds=4, **given))
        for given in (
            {},
            {"threat": threat},
            {"threat": threat, "mean": Median()},
            {"threat": threat, "screens": (NormBounding(max_norm=0.5),)},
        )
    )
    assert honest < 1.0
    assert spoilt > 1.5
    assert median < honest + 0.1
    assert bounded < 1.2


def test_engines_agree_and_a_run_can_be_resumed(folder: str, tmp_path: Path) -> None:
    bench = Bench.of(load(folder, head="sequence_classification", num_labels=3), Full(), 0)
    threat = PGA(clients=("c1", "c2"))
    whole, alone = (made(bench, Full(), threat=threat, **e).run() for e in ({}, {"engine": Trainer}))
    made(bench, Full(), threat=threat, rounds=1).run(tmp_path / "a")
    for name, tensor in whole.state.weights.items():
        assert torch.allclose(tensor, alone.state.weights[name], atol=1e-5)


def test_methods_whose_work_is_of_another_kind_are_refused(federation: Callable[..., Federation]) -> None:
    training = replace(FAST, optim="sgd", max_grad_norm=0.0)
    with pytest.raises(Incompatible, match="PGA needs ONE_FIT"):
        federation(FedKSeed(), threat=PGA(), space=Full(), training=training)
    assert federation(FedAvg(), threat=PGA()).attack is not None


def test_settings_that_mean_nothing() -> None:
    with pytest.raises(RecipeError) as caught:
        PGA(factor=0.0)
    assert str(caught.value) == "PGA factor must be above 0 and finite, but is 0.0."
