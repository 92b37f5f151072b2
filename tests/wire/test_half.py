"""Numbers in sixteen bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fedfm import parts
from fedfm.core import seeds, traits, trees
from fedfm.core.method import Method
from fedfm.core.traits import Trait
from fedfm.core.update import Update
from fedfm.errors import BadUpdate, Incompatible
from fedfm.sample import Uniform
from fedfm.wire import QSGD, Clip, Gaussian, codec
from fedfm.wire.half import Half
from fedfm.wire.stage import Sender, Setting, Stage


def sender() -> Sender:
    return Sender(seeds.generator(0, "half"))


def there_and_back(update: Update) -> Update:
    """Over the wire as bytes, as it really goes."""
    return Half().receive(codec.decode(codec.encode(Half().send(update, sender())), "ann"), None)


def test_by_hand() -> None:
    # From 1 to 2 the numbers of bfloat16 are 2^-7 apart. 1 + 2^-8 lies in the middle of 1 and 1 + 2^-7, and 1 has the
    # even last bit; 1 + 3 * 2^-8 lies in the middle of 1 + 2^-7 and 1 + 2^-6, of which the latter has it.
    x = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -3.14159265, 1e30, 0.0])
    back = there_and_back(Update({"w": x}, weight=2.0))
    assert back.tensors["w"].tolist()[:4] == [1.0, 1 + 2**-6, 1 + 2**-7, -3.140625]
    # 1e30 is 1.5777 * 2^99, and 1.5777 * 128 = 201.95.
    assert back.tensors["w"].tolist()[4:] == [202 / 128 * 2.0**99, 0.0]
    assert back.weight == 2.0


def test_the_error_of_each_number_is_within_the_bound() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(10_000, generator=g) * torch.logspace(-30, 30, 10_000)
    back = there_and_back(Update({"w": x})).tensors["w"]
    error = (back.double() / x.double() - 1).abs()
    # The bound is met, and nearly reached.
    assert 0.95 * 2**-8 < error.max() <= 2**-8
    # Rounding goes both ways: cut off, the mean would be 0.4 of the bound.
    assert abs(float((back.double() / x.double() - 1).mean())) < 0.02 * 2**-8


def test_a_number_takes_two_bytes() -> None:
    update = Update({f"layers.{i}.lora_A.weight": torch.randn(8, 576) for i in range(6)})
    sent = Half().send(update, sender())
    assert trees.nbytes(sent.tensors) == 2 * 6 * 8 * 576
    assert {n: t.shape for n, t in sent.tensors.items()} == {n: t.shape for n, t in update.tensors.items()}
    assert codec.size(update) - codec.size(sent) > 2 * 6 * 8 * 576 - 100


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_server_works_with_float32_whatever_was_trained(dtype: torch.dtype) -> None:
    x = torch.randn(50, generator=torch.Generator().manual_seed(0)).to(dtype)
    back = there_and_back(Update({"w": x.view(5, 10)})).tensors["w"]
    assert back.dtype == torch.float32
    assert back.shape == (5, 10)
    torch.testing.assert_close(back.flatten().double(), x.double(), rtol=2**-7.9, atol=0)


def test_integers_scalars_and_empty_tensors_survive() -> None:
    update = Update({"steps": torch.tensor([2**31 + 1, 3]), "scalar": torch.tensor(0.5), "none": torch.zeros(0, 4)})
    back = there_and_back(update).tensors
    assert back["steps"].tolist() == [2**31 + 1, 3]
    assert back["steps"].dtype == torch.int64
    assert back["scalar"].item() == 0.5
    assert back["none"].shape == (0, 4)


def test_nothing_changes_in_place() -> None:
    update = Update({"w": torch.tensor([0.1])})
    Half().send(update, sender())
    assert update.tensors["w"].dtype == torch.float32
    assert update.tensors["w"].item() == torch.tensor(0.1).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_what_it_never_sends_is_refused(dtype: torch.dtype) -> None:
    sent = Half().send(Update({"v": torch.ones(2), "w": torch.ones(3)}), sender())
    changed: dict[str, Any] = {**sent.tensors, "w": torch.ones(3, dtype=dtype)}
    with pytest.raises(BadUpdate, match=rf"tensor 'w' holds {dtype}, not torch.bfloat16"):
        Half().receive(replace(sent, tensors=changed), None)


def test_a_bound_on_the_norm_does_not_outlive_rounding() -> None:
    # 1 + 3 * 2^-8 is rounded up.
    update = Update({"w": torch.tensor([1 + 3 * 2**-8])})
    assert trees.norm(there_and_back(update).tensors) > trees.norm(update.tensors)
    assert Half.breaks == {Trait.BOUNDED}
    with pytest.raises(Incompatible, match=r"Gaussian needs BOUNDED .* which Half takes away"):
        traits.check(Method(), [Clip(1.0), Half(), Gaussian(1.0)])
    traits.check(Method(), [Clip(1.0), Gaussian(1.0), Half()])


@pytest.mark.parametrize("later", [Clip(1.0), QSGD()])
def test_no_stage_works_on_what_it_sends(later: Stage) -> None:
    stages = (Half(), later)
    with pytest.raises(Incompatible, match=f"Put {type(later).__name__} before Half in stages"):
        stages[0].fits(Setting(stages, Uniform(), 3))
    stages[0].fits(Setting((Clip(1.0), stages[0]), Uniform(), 3))


def test_a_recipe_names_it() -> None:
    assert parts.make("wire", "half", "stages.0") == Half()
