"""Stochastic quantisation."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedfm import parts
from fedfm.core import seeds, traits, trees
from fedfm.core.method import Method
from fedfm.core.traits import Trait
from fedfm.core.update import Update
from fedfm.errors import BadUpdate, Incompatible, RecipeError
from fedfm.sample import Uniform
from fedfm.wire import QSGD, Clip, Gaussian, TopK, codec, packing
from fedfm.wire.stage import Sender, Setting

BITS = {1: 2, 2: 4, 7: 4, 8: 8, 127: 8, 128: 16, 32767: 16}


def sender(*names: str | int) -> Sender:
    return Sender(seeds.generator(0, "qsgd", *names))


def there_and_back(stage: QSGD, update: Update, *names: str | int) -> Update:
    """Over the wire as bytes, as it really goes."""
    return stage.receive(codec.decode(codec.encode(stage.send(update, sender(*names))), "ann"), None)


def random_update(d: int = 300) -> Update:
    g = torch.Generator().manual_seed(d)
    return Update({"w": torch.randn(d // 3, 3, generator=g), "b": torch.randn(7, generator=g) * 100}, weight=5.0)


def test_by_hand_where_nothing_is_left_to_chance() -> None:
    # ||(3, 0, -4)|| = 5 and s = 5, so the levels are 3, 0, -4 exactly.
    sent = QSGD(5).send(Update({"w": torch.tensor([3.0, 0.0, -4.0])}, weight=2.0), sender())
    assert sent.tensors["qsgd-norms"].tolist() == [5.0]
    # Codes 3 + 5 = 8, 0 + 5 = 5, -4 + 5 = 1 in 4 bits each, the first lowest: 8 + 16 * 5 = 88, then 1.
    assert sent.tensors["qsgd-levels"].tolist() == [88, 1]
    back = QSGD(5).receive(sent, None)
    assert back.tensors["w"].tolist() == [3.0, 0.0, -4.0]
    assert back.weight == 2.0


@pytest.mark.parametrize(("levels", "bits"), BITS.items())
def test_values_take_the_bits_that_the_levels_need(levels: int, bits: int) -> None:
    d = 1001
    stage, update = QSGD(levels), Update({"w": torch.randn(7, 143, generator=torch.Generator().manual_seed(0))})
    assert stage.bits == bits
    sent = stage.send(update, sender())
    # The payload is the levels and one norm of 4 bytes.
    assert trees.nbytes(sent.tensors) == math.ceil(d * bits / 8) + 4
    # The headers of three tensors add less than 400 bytes.
    assert codec.size(sent) <= math.ceil(d * bits / 8) + 4 + 400
    back = there_and_back(stage, update)
    assert back.tensors["w"].shape == (7, 143)
    assert back.tensors["w"].dtype == torch.float32


def test_the_wire_is_a_quarter_or_less_of_float32() -> None:
    update = Update({f"layers.{i}.lora_A.weight": torch.randn(8, 576) for i in range(6)})
    plain = codec.size(update)
    assert codec.size(QSGD(127).send(update, sender())) < 0.27 * plain
    assert codec.size(QSGD(7).send(update, sender())) < 0.14 * plain
    assert codec.size(QSGD(1).send(update, sender())) < 0.08 * plain


@pytest.mark.parametrize("levels", [1, 3, 100])
def test_it_is_right_on_average(levels: int) -> None:
    # One draw of coordinate i has variance at most (||x|| / s)^2 / 4; the mean of n draws is within 5 of its std.
    x = torch.tensor([0.5, -0.25, 0.01, 2.0, -1.0, 0.0])
    n, stage, draw = 2000, QSGD(levels), sender("mean")
    total = torch.zeros(6, dtype=torch.float64)
    for _ in range(n):
        total += stage.receive(stage.send(Update({"w": x}), draw), None).tensors["w"].double()
    bound = 5 * (x.norm().item() / levels) / 2 / math.sqrt(n)
    assert (total / n - x).abs().max().item() <= bound
    assert total[5] == 0


@pytest.mark.parametrize("levels", [1, 4, 16, 64])
def test_the_error_is_within_the_papers_bound(levels: int) -> None:
    # E ||Q(x) - x||^2 <= min(d / s^2, sqrt(d) / s) ||x||^2, and one draw is at most one level off.
    d = 200
    x = torch.randn(d, generator=torch.Generator().manual_seed(3))
    errors = []
    for i in range(200):
        back = there_and_back(QSGD(levels), Update({"w": x}), i).tensors["w"]
        assert (back - x).abs().max() <= x.norm() / levels * (1 + 1e-5)
        errors.append((back - x).square().sum().item())
    mean = sum(errors) / len(errors)
    assert 0 < mean <= min(d / levels**2, math.sqrt(d) / levels) * x.square().sum().item()


def test_many_levels_are_nearly_lossless() -> None:
    update = random_update()
    back = there_and_back(QSGD(32767), update)
    for name, tensor in update.tensors.items():
        assert (back.tensors[name] - tensor).abs().max() <= tensor.norm() / 32767 * (1 + 1e-5)


@pytest.mark.parametrize("levels", BITS)
def test_zero_single_scalar_and_empty_tensors_survive(levels: int) -> None:
    update = Update(
        {
            "zero": torch.zeros(5),
            "one": torch.tensor([-2.5]),
            "scalar": torch.tensor(0.3),
            "none": torch.zeros(0, 4),
            "steps": torch.tensor([3, 4]),
        }
    )
    back = there_and_back(QSGD(levels), update).tensors
    assert back.keys() == update.tensors.keys()
    for name, tensor in update.tensors.items():
        assert back[name].shape == tensor.shape
        torch.testing.assert_close(back[name], tensor, rtol=1e-6, atol=0)
    assert there_and_back(QSGD(levels), Update({})).tensors == {}


def test_rounding_of_the_norm_does_not_make_a_level_too_high() -> None:
    # In float32 the norm of 1 + 5.9e-8 is 1, so the coordinate lies above it by 0.002 of 32767 levels: of 3000 such
    # tensors about 6 would be rounded up to level 32768, which in 16 bits is -32768.
    update = Update({f"{i}": torch.tensor([1 + 5.9e-8], dtype=torch.float64) for i in range(3000)})
    back = QSGD(32767).receive(QSGD(32767).send(update, sender()), None)
    assert all(tensor.item() == 1.0 for tensor in back.tensors.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_arrive_as_float32(dtype: torch.dtype) -> None:
    x = torch.randn(50, generator=torch.Generator().manual_seed(0)).to(dtype)
    back = there_and_back(QSGD(32767), Update({"w": x})).tensors["w"]
    assert back.dtype == torch.float32
    torch.testing.assert_close(back.double(), x.double(), rtol=0, atol=1e-3)


def test_the_same_draw_gives_the_same_bits_and_nothing_changes_in_place() -> None:
    update = random_update()
    before = trees.clone(update.tensors)
    one, other = (QSGD(3).send(update, sender("same")) for _ in range(2))
    assert torch.equal(one.tensors["qsgd-levels"], other.tensors["qsgd-levels"])
    another = QSGD(3).send(update, sender("other"))
    assert not torch.equal(one.tensors["qsgd-levels"], another.tensors["qsgd-levels"])
    assert all(torch.equal(update.tensors[n], before[n]) for n in before)


def test_after_topk_the_values_are_quantised_and_the_positions_are_not() -> None:
    update, first = random_update(), sender("first")
    sent = QSGD(127).send(TopK(0.1).send(update, first), first)
    assert sent.tensors["topk-positions"].dtype == torch.int32
    assert len(sent.tensors["qsgd-norms"]) == 1  # that of the values; placeholders have none
    back = codec.decode(codec.encode(sent), "ann")
    back = TopK(0.1).receive(QSGD(127).receive(back, update.tensors), update.tensors)
    alone = TopK(0.1).receive(TopK(0.1).send(update, sender()), update.tensors)
    for name in update.tensors:
        assert back.tensors[name].shape == update.tensors[name].shape
        error = (back.tensors[name] - alone.tensors[name]).abs().max()
        assert error <= trees.norm(alone.tensors) / 127 * 1.001


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(BadUpdate, match="norm of a tensor is not finite"):
        QSGD().send(Update({"w": torch.tensor([1.0, bad])}), sender())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qsgd-levels": None}, "tensor 'qsgd-levels' is missing"),
        ({"qsgd-norms": None}, "tensor 'qsgd-norms' is missing"),
        ({"qsgd-levels": torch.zeros(149, dtype=torch.uint8)}, r"holds torch.uint8 \[149\], not torch.uint8 \[154\]"),
        ({"qsgd-levels": torch.zeros(154)}, "holds torch.float32"),
        ({"qsgd-levels": torch.full((154,), 255, dtype=torch.uint8)}, "never sends"),
        ({"qsgd-norms": torch.tensor([1.0, float("nan")])}, "never sends"),
        ({"qsgd-norms": torch.tensor([1.0, -1.0])}, "never sends"),
        ({"qsgd-norms": torch.tensor([1.0])}, "not torch.float32 .2."),
        ({"qsgd:w": torch.zeros(100, 3)}, r"tensor 'qsgd:w' has shape \[100, 3\], not \[0, ...\]"),
        ({"qsgd:w": torch.zeros(0, 10**9, 3)}, "'qsgd-levels' holds"),
    ],
)
def test_what_it_never_sends_is_refused(change: dict[str, Any], message: str) -> None:
    # 307 values in 4 bits are 154 bytes.
    sent = QSGD(5).send(random_update(), sender())
    tensors = {n: t for n, t in {**sent.tensors, **change}.items() if t is not None}
    with pytest.raises(BadUpdate, match=message):
        QSGD(5).receive(replace(sent, tensors=tensors), None)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packing_by_all_lengths(bits: int) -> None:
    for d in range(20):
        codes = torch.randint(2**bits, (d,), generator=torch.Generator().manual_seed(d), dtype=torch.uint8)
        packed = packing.pack(codes, bits)
        assert len(packed) == math.ceil(d * bits / 8)
        assert packing.unpack(packed, bits, d).tolist() == codes.tolist()


def test_composition() -> None:
    with pytest.raises(Incompatible, match=r"Gaussian needs BOUNDED .* which QSGD takes away"):
        traits.check(Method(), [Clip(1.0), QSGD(), Gaussian(1.0)])
    assert QSGD.breaks == {Trait.BOUNDED}
    stages = (QSGD(), Clip(1.0))
    with pytest.raises(Incompatible, match="Put Clip before QSGD in stages"):
        stages[0].fits(Setting(stages, Uniform(), 3))
    stages[0].fits(Setting((stages[1], stages[0]), Uniform(), 3))


@pytest.mark.parametrize("levels", [0, -1, 32768])
def test_levels_that_cannot_be_sent_are_refused(levels: int) -> None:
    with pytest.raises(RecipeError) as caught:
        QSGD(levels)
    assert str(caught.value) == f"QSGD levels must be at least 1 and at most 32767, but is {levels}."


def test_a_recipe_names_it() -> None:
    assert parts.make("wire", {"kind": "qsgd", "levels": 7}, "stages.0") == QSGD(7)
