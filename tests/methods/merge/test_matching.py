"""Which hidden unit of one network is which of another."""

from __future__ import annotations

import pytest
import torch

from fedfm.methods.merge.matching import blocks, match, matched_mean, orders

NAMES = {
    "bert": [
        "e.layer.0.intermediate.dense.weight",
        "e.layer.0.intermediate.dense.bias",
        "e.layer.0.output.dense.weight",
    ],
    "llama": ["m.layers.0.mlp.gate_proj.weight", "m.layers.0.mlp.up_proj.weight", "m.layers.0.mlp.down_proj.weight"],
    "distilbert": ["t.layer.0.ffn.lin1.weight", "t.layer.0.ffn.lin1.bias", "t.layer.0.ffn.lin2.weight"],
}


def layer(seed: int, hidden: int = 8, width: int = 5) -> dict[str, torch.Tensor]:
    """A feed-forward layer of BERT's kind."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((hidden, width), (hidden,), (width, hidden))
    return {n: torch.randn(*s, generator=g) for n, s in zip(NAMES["bert"], shapes, strict=True)}


def output(tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    into, bias, out = (tensors[n] for n in NAMES["bert"])
    return torch.nn.functional.gelu(x @ into.T + bias) @ out.T


@pytest.mark.parametrize("kind", NAMES)
def test_layers_are_known_by_their_names(kind: str) -> None:
    [block] = blocks([*NAMES[kind], "embeddings.weight"])
    assert {*block.rows, block.columns} == set(NAMES[kind])


def test_blocks_come_in_order_of_depth() -> None:
    names = [n.replace(".0.", f".{i}.") for i in (10, 2, 0) for n in NAMES["llama"]]
    assert [b.stem for b in blocks(names)] == ["m.layers.0", "m.layers.2", "m.layers.10"]


def test_the_nearest_assignment_by_hand() -> None:
    # Units 5 and 1 against 0 and 4: 1 -> 0 and 5 -> 4 costs 1 + 1; the other way round 25 + 9.
    assert match(torch.tensor([[5.0], [1.0]]), torch.tensor([[0.0], [4.0]])).tolist() == [1, 0]
    # Greedy would give 0 to its nearest, 1, and leave 10 for 2 (1 + 64); together 1 -> 2 and 10 -> 0 costs 1 + 100.
    assert match(torch.tensor([[1.0], [10.0]]), torch.tensor([[0.0], [2.0]])).tolist() == [0, 1]


def test_a_shuffled_layer_computes_the_same_and_is_put_in_order_again() -> None:
    [block] = blocks(NAMES["bert"])
    own, x = layer(0), torch.randn(3, 5, generator=torch.Generator().manual_seed(9))
    shuffle = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    other = block.permuted(own, shuffle)
    assert torch.allclose(output(own, x), output(other, x), atol=1e-5)
    mean = matched_mean(block, [own, other], [1.0, 1.0], sweeps=0)
    assert all(torch.allclose(mean[n], own[n], atol=1e-6) for n in own)
    plain = {n: (own[n] + other[n]) / 2 for n in own}
    assert not torch.allclose(output(plain, x), output(own, x), atol=0.1)


def test_weights_count_and_the_heaviest_lays_down_the_order() -> None:
    [block] = blocks(NAMES["bert"])
    light, heavy = layer(0), layer(1)
    mean = matched_mean(block, [light, heavy], [1.0, 3.0], sweeps=2)
    order = match(block.units(light), block.units(heavy))
    wanted = block.permuted(light, order)
    assert all(torch.allclose(mean[n], (wanted[n] + 3 * heavy[n]) / 4, atol=1e-6) for n in light)


def test_sweeps_bring_units_nearer_to_each_other() -> None:
    [block] = blocks(NAMES["bert"])
    units = [block.units(layer(seed, hidden=16)) for seed in range(6)]

    def spread(sweeps: int) -> float:
        stack = torch.stack([u[o] for u, o in zip(units, orders(units, [1.0] * 6, sweeps), strict=True)])
        return float((stack - stack.mean(0)).square().sum())

    assert spread(5) < spread(0)
    for found in orders(units, [1.0] * 6, 3):
        assert sorted(found.tolist()) == list(range(16))
