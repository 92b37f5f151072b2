"""Clipping of uploads to a norm."""

from __future__ import annotations

import math

import pytest
import torch

from fedfm import parts
from fedfm.core import seeds, trees
from fedfm.core.traits import Trait
from fedfm.core.update import Kind, Update
from fedfm.errors import BadUpdate, RecipeError
from fedfm.wire.clip import Clip
from fedfm.wire.stage import Sender

SENDER = Sender(seeds.generator(0, "clip"))


def test_by_hand_over_all_tensors_together() -> None:
    # ||(3, 4, 12)|| = 13, so with S = 6.5 everything is halved.
    update = Update({"a": torch.tensor([3.0, 4.0]), "b": torch.tensor(-12.0)}, weight=7, metrics={"loss": 2.0})
    clipped = Clip(6.5).send(update, SENDER)
    assert clipped.tensors["a"].tolist() == pytest.approx([1.5, 2.0])
    assert clipped.tensors["b"].item() == pytest.approx(-6.0)
    assert clipped.weight == 1.0
    assert dict(clipped.metrics) == {"loss": 2.0}


def test_what_is_within_the_bound_keeps_every_bit_but_not_its_weight() -> None:
    values = torch.tensor([3.0, 4.0])
    for bound in (5.0, 5.1, 1e9):
        clipped = Clip(bound).send(Update({"a": values}, weight=123.0, member="ann"), SENDER)
        assert torch.equal(clipped.tensors["a"], torch.tensor([3.0, 4.0]))
        assert (clipped.weight, clipped.member) == (1.0, "ann")


def test_the_norm_is_bounded_and_the_direction_stays() -> None:
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        update = Update({n: torch.randn(30, generator=g) * 10 for n in "ab"}, weight=2)
        clipped = Clip(0.7).send(update, SENDER)
        assert trees.norm(clipped.tensors) == pytest.approx(0.7, rel=2**-9)
        assert trees.norm(clipped.tensors) <= 0.7
        one = torch.cat([update.tensors[n] for n in "ab"])
        other = torch.cat([clipped.tensors[n] for n in "ab"])
        assert torch.cosine_similarity(one, other, dim=0).item() == pytest.approx(1.0, abs=1e-6)


def test_the_larger_the_bound_the_less_is_taken() -> None:
    update = Update({"a": torch.tensor([30.0, 40.0])})
    norms = [trees.norm(Clip(bound).send(update, SENDER).tensors) for bound in (1.0, 10.0, 49.0, 50.0, 60.0)]
    assert norms == pytest.approx([1.0, 10.0, 49.0, 50.0, 50.0], rel=2**-9)
    assert norms == sorted(norms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_rounding_never_leaves_the_norm_above_the_bound(dtype: torch.dtype) -> None:
    # float32 and bfloat16 round up about as often as down, so without care every other upload would be above.
    for seed in range(100):
        g = torch.Generator().manual_seed(seed)
        update = Update({n: (torch.randn(5 + 50 * (seed % 3), generator=g) * 10).to(dtype) for n in "ab"})
        for bound in (1e-3, 0.1, 1.0, 3.0):
            clipped = Clip(bound).send(update, SENDER).tensors
            squares = [x * x for tensor in clipped.values() for x in tensor.double().tolist()]
            norm = math.sqrt(math.fsum(squares))
            assert norm <= bound * (1 + 1e-15), (seed, bound)  # the sum here may differ in the last bit of float64
            assert norm >= bound * (1 - 2**-6), (seed, bound)  # and hardly more than needed is taken
            assert all(clipped[n].dtype == dtype for n in "ab")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_norm_that_is_not_finite_is_refused(bad: float) -> None:
    update = Update({"good": torch.ones(2), "bad": torch.tensor([bad, 5.0])})
    with pytest.raises(BadUpdate, match="its norm is not finite, so it cannot be clipped"):
        Clip(1.0).send(update, SENDER)


def test_a_recipe_names_it_clip() -> None:
    assert Clip.id == "clip"
    assert parts.make("wire", {"kind": "clip", "max_norm": 2.0}, "stages.0") == Clip(2.0)
    with pytest.raises(RecipeError, match=r"stages\.0\.max_norm is missing"):
        parts.make("wire", "clip", "stages.0")


def test_zero_tiny_and_empty_updates() -> None:
    zero = Clip(1.0).send(Update({"a": torch.zeros(3)}, weight=5), SENDER)
    assert zero.tensors["a"].tolist() == [0.0, 0.0, 0.0]
    assert zero.weight == 1.0
    tiny = torch.tensor([1e-30, 0.0])
    assert torch.equal(Clip(1.0).send(Update({"a": tiny}), SENDER).tensors["a"], tiny)
    empty = Clip(1.0).send(Update({}, weight=5), SENDER)
    assert empty.tensors == {}
    assert empty.weight == 1.0


def test_a_huge_but_finite_update_does_not_pass_the_bound() -> None:
    clipped = Clip(2.0).send(Update({"a": torch.full((4,), 1e18)}), SENDER)
    assert trees.norm(clipped.tensors) == pytest.approx(2.0, rel=2**-9)
    assert trees.norm(clipped.tensors) <= 2.0


def test_the_update_itself_is_not_changed_and_no_number_is_drawn() -> None:
    update = Update({"a": torch.tensor([3.0, 4.0])}, weight=7)
    state = SENDER.draw.get_state()
    Clip(1.0).send(update, SENDER)
    assert update.tensors["a"].tolist() == [3.0, 4.0]
    assert update.weight == 7
    assert torch.equal(SENDER.draw.get_state(), state)
    assert SENDER.kept is None


def test_the_server_takes_an_honest_upload_as_it_is() -> None:
    update = Clip(1.0).send(Update({"a": torch.tensor([3.0, 4.0])}, weight=7.0), SENDER)
    received = Clip(1.0).receive(update, None)
    assert torch.equal(received.tensors["a"], update.tensors["a"])
    assert received.weight == 1.0


def test_a_client_that_skips_its_half_gains_nothing() -> None:
    # ||(30, 40)|| = 50 and the weight is a thousand; the server makes of it (0.6, 0.8), weight 1.
    received = Clip(1.0).receive(Update({"a": torch.tensor([30.0, 40.0])}, weight=1000.0, member="eve"), None)
    assert received.tensors["a"].tolist() == pytest.approx([0.6, 0.8], rel=2**-9)
    assert trees.norm(received.tensors) <= 1.0
    assert (received.weight, received.member) == (1.0, "eve")


def test_it_works_on_changes_of_weights_alone() -> None:
    assert Clip.kinds == {Kind.DELTA}


def test_it_gives_a_bound_and_equal_weights() -> None:
    assert Clip.gives == {Trait.BOUNDED, Trait.UNIFORM}
    assert Clip.needs == Clip.breaks == frozenset()


@pytest.mark.parametrize("bound", [0.0, -1.0, float("inf"), float("nan")])
def test_a_bound_that_bounds_nothing_is_refused(bound: float) -> None:
    with pytest.raises(RecipeError) as caught:
        Clip(bound)
    assert str(caught.value) == f"Clip max_norm must be above 0 and finite, but is {bound}."
