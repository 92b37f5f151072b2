"""A bound that follows a quantile of the norms."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedfm.core import seeds, trees
from fedfm.core.mean import WeightedMean
from fedfm.core.update import Update
from fedfm.errors import BadUpdate, RecipeError
from fedfm.federation import Federation
from fedfm.links.flower import InMemoryFlower
from fedfm.methods.lora.fedit import FedIT
from fedfm.sample import Poisson, Uniform
from fedfm.wire import AdaptiveClip, Clip, DistributedGaussian, Gaussian, LocalGaussian, TopK
from fedfm.wire.adaptive_clip import BELOW
from fedfm.wire.stage import Sender, Setting

Make = Callable[..., Federation]
SENDER = Sender(seeds.generator(0, "adaptive"))
NOISE = Gaussian(0.05, delta=1e-3)


def around(clip: AdaptiveClip, noise: Gaussian = NOISE, population: int = 40, **more: Any) -> Setting:
    return Setting((clip, noise), Uniform(), population, **more)


def draw(*names: str | int) -> torch.Generator:
    return seeds.generator(0, "adaptive", *names)


def test_a_client_says_whether_it_was_within_the_bound() -> None:
    # ||(3, 4)|| = 5.
    for bound, bit, norm in ((5.0, 0.5, 5.0), (4.9, -0.5, 4.9), (10.0, 0.5, 5.0)):
        sent = AdaptiveClip(bound).send(Update({"w": torch.tensor([3.0, 4.0])}, weight=9.0), SENDER)
        assert float(sent.tensors[BELOW]) == bit
        assert trees.norm({"w": sent.tensors["w"]}) == pytest.approx(norm, rel=2**-9)
        assert sent.weight == 1.0
        back = AdaptiveClip(bound).receive(sent, None)
        assert torch.equal(back.tensors["w"], sent.tensors["w"])
    hostile = Update({"w": torch.full((9,), 1e9), BELOW: torch.tensor(0.5)}, weight=1e6)
    assert trees.norm({"w": AdaptiveClip(2.0).receive(hostile, None).tensors["w"]}) <= 2.0


@pytest.mark.parametrize("bit", [None, 0.0, 7.0, math.nan, -math.inf])
def test_another_bit_is_refused(bit: float | None) -> None:
    lie = {} if bit is None else {BELOW: torch.tensor(bit)}
    with pytest.raises(BadUpdate, match="is neither a half nor minus a half"):
        AdaptiveClip(1.0).receive(Update({"w": torch.ones(2), **lie}), None)


def test_one_step_by_hand() -> None:
    # 30 of 40 within the bound: the sum of the halves is 10, so the share is 0.75, and S is times e^(-0.2 * 0.25).
    clip = AdaptiveClip(2.0, bit_noise=1e-9)
    setting = around(clip, Gaussian(1e-10), beside={BELOW: torch.tensor(10.0)})
    mean = Update({"w": torch.ones(3)}, weight=40.0)
    assert clip.release(mean, setting, draw()) is mean
    kept = setting.kept[0]
    assert float(kept["max_norm"]) == pytest.approx(2 * math.exp(-0.05), rel=1e-6)
    assert clip.at(kept).max_norm == float(kept["max_norm"])
    assert clip.at(clip.at(kept).told()) == clip.at(kept)
    assert clip.at({}) == clip


@pytest.mark.parametrize(("quantile", "start"), [(0.5, 0.01), (0.5, 50.0), (0.9, 1.0)])
def test_the_bound_follows_the_quantile(quantile: float, start: float) -> None:
    """Norms are log-normal, of median 1: the bound goes to their quantile, from far below and from far above."""
    clip, setting = AdaptiveClip(start, quantile), None
    g, bounds = torch.Generator().manual_seed(1), []
    for t in range(150):
        now = clip.at(setting.kept[0]) if setting else clip
        norms = torch.exp(torch.randn(100, generator=g))
        bits = sum(
            float(now.send(Update({"w": norm * torch.tensor([0.6, 0.8])}), SENDER).tensors[BELOW]) for norm in norms
        )
        setting = around(now, population=100, beside={BELOW: torch.tensor(bits)})
        now.release(Update({}, weight=100.0), setting, draw(t))
        bounds.append(now.max_norm)
    wanted = math.exp(torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(quantile)).item())
    assert sum(bounds[-30:]) / 30 == pytest.approx(wanted, rel=0.15)


def test_the_noise_on_the_bits_is_what_is_said() -> None:
    clip = AdaptiveClip(1.0, bit_noise=3.0)
    found = []
    for t in range(4000):
        setting = around(clip)
        clip.release(Update({}, weight=0.0), setting, draw("bits", t))
        found.append(40 * ((-math.log(float(setting.kept[0]["max_norm"])) / 0.2) + 0.5 - 0.5))
    assert torch.tensor(found).std().item() == pytest.approx(3.0, rel=0.05)


def test_both_releases_together_spend_what_one_would() -> None:
    # z^-2 = z_delta^-2 + (2 sigma_b)^-2 with z = 1 and sigma_b = 2: z_delta = (1 - 1/16)^(-1/2).
    clip, noise = AdaptiveClip(2.0, bit_noise=2.0), Gaussian(1.0)
    setting = around(clip, noise)
    assert clip.raised(1.0, setting) == pytest.approx((15 / 16) ** -0.5)
    released = noise.release(Update({"w": torch.zeros(40_000)}, weight=0.0), setting, draw())
    assert released.tensors["w"].std().item() == pytest.approx((15 / 16) ** -0.5 * 2.0 / 40, rel=0.02)
    plain = noise.release(
        Update({"w": torch.zeros(40_000)}, weight=0.0), Setting((Clip(2.0), noise), Uniform(), 40), draw()
    )
    assert released.tensors["w"].std() / plain.tensors["w"].std() == pytest.approx((15 / 16) ** -0.5, rel=1e-4)
    # What is chosen by the cohort: a twentieth of 400, or z where that is more.
    many, few = AdaptiveClip(), AdaptiveClip()
    assert many.raised(1.0, around(many, noise, 400)) == pytest.approx((1 - 1 / 40**2) ** -0.5)
    assert few.raised(1.0, around(few, noise, 3)) == pytest.approx((3 / 4) ** -0.5)


def test_one_client_changes_bits_and_sum_by_no_more_than_is_accounted_for() -> None:
    g = torch.Generator().manual_seed(0)
    clip = AdaptiveClip(1.5)
    sent = [clip.send(Update({"w": torch.randn(9, generator=g) * s}), SENDER) for s in (0.1, 1, 9, 1e6)]
    for without in range(4):
        rest = [u for i, u in enumerate(sent) if i != without]
        change = sum(u.tensors["w"] for u in sent) - sum(u.tensors["w"] for u in rest)
        bits = sum(float(u.tensors[BELOW]) for u in sent) - sum(float(u.tensors[BELOW]) for u in rest)
        assert float(change.norm()) <= 1.5 * (1 + 1e-5)
        assert abs(bits) == 0.5


def stages(**more: Any) -> dict[str, Any]:
    return {"stages": (AdaptiveClip(0.05, **more), Gaussian(0.1, delta=1e-3)), "sampler": Poisson(0.9), "rounds": 4}


@pytest.mark.parametrize("link", [None, InMemoryFlower])
def test_a_run_adapts_and_goes_on_where_it_was(federation: Make, tmp_path: Path, link: Any) -> None:
    more = {"link": link} if link else {}
    whole = federation(FedIT(), **stages(), **more)
    told: list[float] = []
    send = AdaptiveClip.send

    def noted(self: AdaptiveClip, *arguments: Any) -> Update:
        told.append(self.max_norm)
        return send(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdaptiveClip, "send", noted)
        outcome = whole.run(tmp_path / "whole")
    assert told[0] == 0.05
    assert len(set(told)) == 4, "one bound for all in a round, another one in the next"
    cut = federation(FedIT(), **stages(), **more)
    cut.plan = replace(cut.plan, rounds=2)
    cut.run(tmp_path / "cut")
    resumed = federation(FedIT(), **stages(), **more).run(tmp_path / "cut", resume=True)
    assert all(torch.equal(t, outcome.state.weights[n]) for n, t in resumed.state.weights.items())
    assert whole.spent(4) == federation(
        FedIT(), **{**stages(), "stages": (Clip(1.0), Gaussian(0.1, delta=1e-3))}
    ).spent(4)


def test_what_travels_beside_is_no_weight(federation: Make) -> None:
    outcome = federation(FedIT(), **stages()).run()
    assert not any("clip" in name or "@" in name for name in outcome.state.weights)
    assert not any(record.get("dropped") for record in outcome.records)
    means = WeightedMean()([Update({"w": torch.ones(1)})])
    assert BELOW not in means.tensors


@pytest.mark.parametrize("later", [(), (Gaussian(1.0), TopK()), (LocalGaussian(1.0),), (LocalGaussian(1.0), NOISE)])
def test_without_noise_on_the_mean_it_is_refused(later: Any) -> None:
    clip = AdaptiveClip()
    with pytest.raises(RecipeError, match="AdaptiveClip must stand directly before Gaussian, at the end of stages"):
        clip.fits(Setting((clip, *later), Uniform(), 9))


def test_noise_of_clients_is_refused() -> None:
    clip = AdaptiveClip()
    with pytest.raises(RecipeError, match="by bits to whose sum the server adds noise, which DistributedGaussian does"):
        clip.fits(Setting((clip, DistributedGaussian(1.0)), Uniform(), 9))


def test_bits_that_spend_all_are_refused() -> None:
    clip = AdaptiveClip(bit_noise=0.4)
    with pytest.raises(RecipeError, match=r"bit_noise must be above half of the noise_multiplier of Gaussian, 1\.0"):
        clip.fits(around(clip, Gaussian(1.0)))
    clip.fits(around(clip, Gaussian(0.7)))
    clip.fits(around(clip, Gaussian(target_epsilon=8.0)))


@pytest.mark.parametrize("settings", [{"quantile": 1.0}, {"learning_rate": 0.0}, {"bit_noise": -1.0}])
def test_wrong_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match=f"AdaptiveClip {next(iter(settings))} must be"):
        AdaptiveClip(**settings)
