"""Top-k sparsification with error feedback."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fedfm import parts
from fedfm.core import seeds, traits, trees
from fedfm.core.method import Method
from fedfm.core.traits import Trait
from fedfm.core.update import Kind, Tensors, Update
from fedfm.errors import BadUpdate, Incompatible, RecipeError
from fedfm.sample import Uniform
from fedfm.wire import QSGD, Clip, Gaussian, TopK, codec
from fedfm.wire.stage import Sender, Setting


def sender(memory: Tensors | None = None) -> Sender:
    return Sender(seeds.generator(0, "topk"), memory or {})


def change(seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(20, 4, generator=g), "b": torch.randn(13, generator=g), "s": torch.randn((), generator=g)}


def wired(stage: TopK, delta: Tensors, memory: Tensors | None = None) -> tuple[Tensors, Tensors]:
    """What the server gets of a change, over bytes, and what the client keeps."""
    client = sender(memory)
    sent = codec.decode(codec.encode(stage.send(Update(delta, weight=3.0), client)), "ann")
    received = stage.receive(sent, delta)
    assert (received.weight, received.member) == (3.0, "ann")
    assert client.kept is not None
    return received.tensors, client.kept


def test_by_hand() -> None:
    # Of 1, -5, 2, 0.5 over both tensors half are sent: -5 and 2. The residual is 1 and 0.5.
    stage, delta = TopK(0.5), {"a": torch.tensor([1.0, -5.0]), "b": torch.tensor([[2.0], [0.5]])}
    client = sender()
    sent = stage.send(Update(delta), client)
    assert sent.tensors["topk-values"].tolist() == [-5.0, 2.0]
    assert sent.tensors["topk-positions"].tolist() == [1, 2]
    assert sent.tensors["topk-positions"].dtype == torch.int32
    received, memory = wired(stage, delta)
    assert {n: t.tolist() for n, t in received.items()} == {"a": [0.0, -5.0], "b": [[2.0], [0.0]]}
    assert {n: t.tolist() for n, t in memory.items()} == {"a": [1.0, 0.0], "b": [[0.0], [0.5]]}
    # A round later the same change: residual and change are 2, -5, 2, 1, so now a's first value goes, too.
    received, memory = wired(TopK(0.75), delta, memory)
    assert {n: t.tolist() for n, t in received.items()} == {"a": [2.0, -5.0], "b": [[2.0], [0.0]]}
    assert {n: t.tolist() for n, t in memory.items()} == {"a": [0.0, 0.0], "b": [[0.0], [1.0]]}


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 1.0])
def test_nothing_is_lost(fraction: float) -> None:
    # sent + residual == old residual + change, each round, exactly.
    memory: Tensors = {}
    for round in range(5):
        delta = change(round)
        sent, after = wired(TopK(fraction), delta, memory)
        for name in delta:
            before = delta[name] + memory[name] if memory else delta[name]
            assert torch.equal(sent[name] + after[name], before)
            assert not ((sent[name] != 0) & (after[name] != 0)).any()
        memory = after


def test_what_is_left_out_comes_in_the_end() -> None:
    # A constant change, sent at a tenth: after many rounds the mean of what was sent is the change.
    delta, memory = change(0), {}
    total = trees.scale(delta, 0.0)
    for _ in range(300):
        sent, memory = wired(TopK(0.1), delta, memory)
        total = trees.add(total, sent)
    off = trees.norm(trees.subtract(trees.scale(total, 1 / 300), delta))
    assert off < 0.1 * trees.norm(delta)
    # Without memory most coordinates would never come.
    assert trees.norm(trees.subtract(wired(TopK(0.1), delta)[0], delta)) > 0.5 * trees.norm(delta)


def test_all_of_it_is_lossless() -> None:
    delta = change(1)
    sent, memory = wired(TopK(1.0), delta)
    for name in delta:
        assert torch.equal(sent[name], delta[name])
        assert sent[name].shape == delta[name].shape
        assert not memory[name].any()


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.3, 0.9])
def test_it_contracts_and_sends_the_largest(fraction: float) -> None:
    # ||x - top_k(x)||^2 <= (1 - k / d) ||x||^2.
    stage, delta = TopK(fraction), change(2)
    sent, memory = wired(stage, delta)
    d, k = trees.count(delta), stage.count(trees.count(delta))
    assert k == -(-fraction * d // 1)
    assert sum(int((t != 0).sum()) for t in sent.values()) == k
    assert trees.norm(memory) ** 2 <= (1 - k / d) * trees.norm(delta) ** 2
    largest = torch.cat([t.flatten().abs() for t in delta.values()]).sort(descending=True).values
    assert min(t[t != 0].abs().min().item() for t in sent.values() if t.any()) == largest[k - 1].item()


def test_bytes_are_those_of_values_and_positions() -> None:
    delta = {f"layers.{i}.lora_B.weight": torch.randn(576, 8) for i in range(4)}
    sent = TopK(0.01).send(Update(delta), sender())
    k = TopK(0.01).count(4 * 576 * 8)
    assert k == 185
    assert trees.nbytes(sent.tensors) == 8 * k
    # Headers: at most 100 bytes for each of six names, and 100 for all.
    assert codec.size(sent) <= 8 * k + 700
    assert codec.size(sent) < 0.05 * codec.size(Update(delta))


def test_the_update_and_the_memory_are_not_changed() -> None:
    delta, memory = change(3), change(4)
    before = trees.clone(delta), trees.clone(memory)
    wired(TopK(0.2), delta, memory)
    assert all(torch.equal(delta[n], before[0][n]) and torch.equal(memory[n], before[1][n]) for n in delta)


def test_other_names_keep_their_residual_and_other_shapes_begin_anew() -> None:
    _, memory = wired(TopK(0.1), {"A": torch.ones(10), "B": torch.ones(10)})
    sent, later = wired(TopK(1.0), {"B": torch.ones(4)}, memory)
    assert sent["B"].tolist() == [1.0] * 4
    assert torch.equal(later["A"], memory["A"])
    assert later["B"].shape == (4,)


def test_the_server_needs_not_know_the_shapes() -> None:
    delta = change(5)
    sent = TopK(0.3).send(Update(delta), sender())
    known, unknown = (TopK(0.3).receive(sent, like).tensors for like in (delta, None))
    assert all(torch.equal(known[n], unknown[n]) for n in delta)


def test_low_precision_arrives_as_float32_and_what_rounding_took_is_kept() -> None:
    delta = {"w": torch.tensor([1.0, -3.0, 0.25], dtype=torch.bfloat16)}
    sent, memory = wired(TopK(0.3), delta, {"w": torch.tensor([0.001, 0.002, 0.003])})
    assert sent["w"].dtype == memory["w"].dtype == torch.float32
    assert (sent["w"] + memory["w"]).tolist() == pytest.approx([1.001, -2.998, 0.253])


def test_empty_updates_survive() -> None:
    assert wired(TopK(), {})[0] == {}
    assert wired(TopK(), {"w": torch.zeros(0, 3)})[0]["w"].shape == (0, 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_and_not_kept(bad: float) -> None:
    client = sender()
    with pytest.raises(BadUpdate, match="it is not finite"):
        TopK().send(Update({"w": torch.tensor([1.0, bad])}), client)
    assert client.kept is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topk-values": None}, "tensor 'topk-values' is missing"),
        ({"topk-positions": None}, "tensor 'topk-positions' is missing"),
        ({"topk-values": torch.ones(3)}, r"holds torch.float32 \[3\], not torch.float32 \[2\]"),
        ({"topk-values": torch.ones(2, dtype=torch.float64)}, "holds torch.float64"),
        ({"topk-positions": torch.ones(2)}, "holds torch.float32"),
        ({"topk-positions": torch.tensor([1, 1], dtype=torch.int32)}, "not rising numbers from 0 to below 4"),
        ({"topk-positions": torch.tensor([2, 1], dtype=torch.int32)}, "not rising numbers"),
        ({"topk-positions": torch.tensor([-1, 1], dtype=torch.int32)}, "not rising numbers"),
        ({"topk-positions": torch.tensor([1, 4], dtype=torch.int32)}, "not rising numbers"),
        ({"topk:w": torch.zeros(0, 10**12)}, r"tensor 'w' has shape \[1000000000000\], not \[4\]"),
        ({"topk:spy": torch.zeros(0, 1)}, r"tensor 'spy' has shape \[1\], not none"),
        ({"topk:w": None}, r"tensor 'w' has shape none, not \[4\]"),
        ({"topk:w": torch.zeros(4)}, r"tensor 'topk:w' has shape \[4\], not \[0, ...\]"),
    ],
)
def test_what_it_never_sends_is_refused(change: dict[str, Any], message: str) -> None:
    like = {"w": torch.zeros(4)}
    sent = TopK(0.5).send(Update({"w": torch.tensor([4.0, 3.0, 2.0, 1.0])}), sender())
    tensors = {n: t for n, t in {**sent.tensors, **change}.items() if t is not None}
    with pytest.raises(BadUpdate, match=message):
        TopK(0.5).receive(replace(sent, tensors=tensors), like)


def test_a_claimed_size_is_not_allocated_even_when_shapes_are_unknown() -> None:
    sent = TopK(0.5).send(Update({"w": torch.ones(4)}), sender())
    tensors = {**sent.tensors, "topk:w": torch.zeros(0, 10**12)}
    with pytest.raises(BadUpdate, match=r"not torch.float32 \[500000000000\]"):
        TopK(0.5).receive(replace(sent, tensors=tensors), None)


def test_composition() -> None:
    after = traits.check(Method(), [TopK()])[-1].after
    assert {Trait.DENSE, Trait.FORGETFUL, Trait.BOUNDED}.isdisjoint(after)
    assert TopK.kinds == {Kind.DELTA}
    with pytest.raises(Incompatible, match=r"Gaussian needs BOUNDED .* which TopK takes away"):
        traits.check(Method(), [Clip(1.0), TopK(), Gaussian(1.0)])


def test_its_place_among_the_stages() -> None:
    topk = TopK()
    for stages in ((Clip(1.0), topk), (topk, QSGD()), (topk,)):
        topk.fits(Setting(stages, Uniform(), 3))
    with pytest.raises(Incompatible) as caught:
        topk.fits(Setting((topk, Clip(1.0)), Uniform(), 3))
    assert str(caught.value) == (
        "Clip cannot work on what TopK sends, which is packed. Put Clip before TopK in stages."
    )


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, float("nan")])
def test_a_fraction_that_is_none_is_refused(fraction: float) -> None:
    with pytest.raises(RecipeError) as caught:
        TopK(fraction)
    assert str(caught.value) == f"TopK fraction must be above 0 and at most 1, but is {fraction}."


def test_a_recipe_names_it() -> None:
    assert parts.make("wire", {"kind": "topk", "fraction": 0.1}, "stages.0") == TopK(0.1)
