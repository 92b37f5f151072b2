"""Arithmetic on named tensors and the meaning of name patterns."""

from __future__ import annotations

import pytest
import torch

from fedfm.core import trees

A = "layers.0.q_proj.lora_A.weight"
B = "layers.0.q_proj.lora_B.weight"
B1 = "layers.1.q_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("name", "patterns", "expected"),
    [
        (B, ("lora_B",), True),  # one whole part of the name
        (B, ("lora",), False),  # only a piece of a part
        (B, ("lora_*",), True),  # a wildcard within a part
        (B, ("lora_?",), True),  # exactly one character
        (B, ("q_?",), False),
        (B, ("layers.0.*",), True),  # a wildcard over the whole name crosses dots
        (B, ("layers.1.*",), False),
        (B, ("layers.0",), False),  # two parts are neither one part nor the whole name
        (B, (B,), True),
        (B, ("*",), True),
        (B, (), False),  # nothing is meant by no pattern
        (B, ("LORA_B",), False),  # case counts
        (B, ("lora_A", "lora_B"), True),  # any of them
        (B, ("0",), True),
        ("layers.10.w", ("0",), False),
        ("", ("*",), True),
    ],
)
def test_a_pattern_means_the_whole_name_or_one_part(name: str, patterns: trees.Patterns, expected: bool) -> None:
    assert trees.matches(name, patterns) is expected


def test_select_and_without_split_a_tree_and_keep_its_order() -> None:
    tree = {name: torch.tensor(float(i)) for i, name in enumerate((B1, A, B))}
    assert list(trees.select(tree, ("lora_B",))) == [B1, B]
    assert list(trees.without(tree, ("lora_B",))) == [A]
    for patterns in ((), ("*",), ("lora_A",), ("layers.1.*", "lora_A")):
        chosen, rest = trees.select(tree, patterns), trees.without(tree, patterns)
        assert chosen.keys() | rest.keys() == tree.keys()
        assert not chosen.keys() & rest.keys()
        assert all(chosen[name] is tree[name] for name in chosen)


def test_add_by_hand() -> None:
    # [1, 2] + 0.5 * [4, -6] = [3, -1]; "other" is only on the left and stays.
    left = {"w": torch.tensor([1.0, 2.0]), "other": torch.tensor([7.0])}
    result = trees.add(left, {"w": torch.tensor([4.0, -6.0])}, 0.5)
    assert result["w"].tolist() == [3.0, -1.0]
    assert result["other"].tolist() == [7.0]
    assert list(result) == ["w", "other"]


def test_add_keeps_the_dtype_of_the_left() -> None:
    result = trees.add({"w": torch.ones(2, dtype=torch.bfloat16)}, {"w": torch.ones(2)})
    assert result["w"].dtype == torch.bfloat16
    assert result["w"].tolist() == [2.0, 2.0]


def test_subtract_scale_nbytes_and_count_by_hand() -> None:
    left = {"a": torch.tensor([5.0, 1.0]), "b": torch.tensor(2.0)}
    right = {"a": torch.tensor([2.0, 4.0]), "b": torch.tensor(0.5)}
    difference = trees.subtract(left, right)
    assert difference["a"].tolist() == [3.0, -3.0]
    assert difference["b"].item() == 1.5
    assert trees.scale(left, -2.0)["a"].tolist() == [-10.0, -2.0]
    # 3 float32 scalars and 5 bfloat16 scalars: 3 * 4 + 5 * 2 bytes.
    mixed = {**left, "c": torch.zeros(5, dtype=torch.bfloat16)}
    assert trees.nbytes(mixed) == 22
    assert trees.count(mixed) == 8


def test_total_by_hand_with_names_that_some_lack() -> None:
    first, second = {"a": torch.tensor([1.0])}, {"a": torch.tensor([2.0]), "b": torch.tensor([4.0])}
    result = trees.total([first, second, {"b": torch.tensor([8.0])}])
    assert {name: tensor.tolist() for name, tensor in result.items()} == {"a": [3.0], "b": [12.0]}
    assert first["a"].tolist() == [1.0]
    assert second["b"].tolist() == [4.0]
    assert trees.total([]) == {}


def test_norm_is_that_of_all_tensors_as_one_vector() -> None:
    # sqrt(3^2 + 4^2 + 12^2) = sqrt(9 + 16 + 144) = 13.
    tree = {"a": torch.tensor([[3.0], [4.0]]), "b": torch.tensor(-12.0), "empty": torch.zeros(0)}
    assert trees.norm(tree) == pytest.approx(13.0, abs=1e-6)
    assert trees.norm({}) == 0.0
    assert trees.norm({"a": torch.zeros(3)}) == 0.0


def test_norm_of_narrow_tensors_is_accumulated_in_something_wider() -> None:
    # bfloat16 has 8 bits: 4096 additions of 1 in it would stop at 256, so the norm at 16 instead of 64.
    assert trees.norm({"a": torch.ones(4096, dtype=torch.bfloat16)}) == 64.0
    # 300^2 is more than float16 can hold (65504).
    assert trees.norm({"a": torch.full((4,), 300.0, dtype=torch.float16)}) == pytest.approx(600.0)
    # sqrt(3) is not a bfloat16 number, and sqrt(4 * 60000^2) = 120000 is more than float16 can hold.
    assert trees.norm({"a": torch.ones(3, dtype=torch.bfloat16)}) == pytest.approx(3**0.5, rel=1e-6)
    assert trees.norm({"a": torch.full((4,), 60000.0, dtype=torch.float16)}) == pytest.approx(120000.0)


def test_norm_of_float64_and_float32_together() -> None:
    tree = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0], dtype=torch.float64)}
    assert trees.norm(tree) == pytest.approx(5.0)


def test_norm_is_accumulated_in_float64() -> None:
    # In float32 a square of 1e30 overflows, one of 1e-30 vanishes, and 1 + 2^-26 is 1.
    assert trees.norm({"a": torch.full((4,), 1e30)}) == pytest.approx(2e30, rel=1e-6)
    assert trees.norm({"a": torch.full((4,), 1e-30)}) == pytest.approx(2e-30, rel=1e-6)
    assert trees.norm({"a": torch.ones(1), "b": torch.tensor(2.0**-13)}) == (1 + 2.0**-26) ** 0.5 > 1


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int64, torch.int8, torch.bool])
def test_norm_of_types_that_know_no_arithmetic(dtype: torch.dtype) -> None:
    values = torch.tensor([1, 1, 0, 1, 1] if dtype is torch.bool else [0, 0, 2, 0, 0])
    assert trees.norm({"a": values.to(dtype)}) == 2.0


def test_wide_is_the_tensor_itself_where_it_is_wide_enough() -> None:
    for dtype in (torch.float32, torch.float64):
        tensor = torch.ones(2, dtype=dtype)
        assert trees.wide(tensor) is tensor
    for dtype in (torch.float16, torch.bfloat16, torch.float8_e5m2, torch.int32, torch.bool):
        assert trees.wide(torch.ones(2).to(dtype)).dtype == torch.float32


def test_unshared_tensors_are_contiguous_and_share_nothing_and_nothing_is_copied_without_need() -> None:
    base, alone = torch.arange(12.0).view(3, 4), torch.ones(5)
    tree = {
        "base": base,
        "again": base,
        "row": base[1],
        "turned": base.T,
        "alone": alone,
        "none": torch.zeros(0),
        "none too": torch.zeros(0, 3),
        "gradient": torch.ones(2, requires_grad=True),
    }
    result = trees.unshared(tree)
    assert list(result) == list(tree)
    for name, tensor in tree.items():
        assert torch.equal(result[name], tensor)
        assert result[name].is_contiguous()
        assert not result[name].requires_grad
    places = [tensor.untyped_storage().data_ptr() for tensor in result.values() if tensor.numel()]
    assert len(set(places)) == len(places)
    assert result["base"].data_ptr() == base.data_ptr()
    assert result["alone"].data_ptr() == alone.data_ptr()


def test_norm_shows_what_is_not_finite() -> None:
    assert trees.norm({"a": torch.tensor([1.0, float("inf")])}) == float("inf")
    assert trees.norm({"a": torch.tensor([1.0, float("nan")]), "b": torch.ones(1)}) != trees.norm({"b": torch.ones(1)})


def test_names_that_are_missing_raise_and_are_named() -> None:
    one, two = {"a": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1), "c": torch.ones(1)}
    with pytest.raises(KeyError, match="2 names of right are not in left, such as 'b'"):
        trees.add(one, two)
    with pytest.raises(KeyError, match="2 names of right are not in left, such as 'b'"):
        trees.subtract(one, two)
    with pytest.raises(KeyError, match="2 names of left are not in right, such as 'b'"):
        trees.subtract(two, one)


def test_nothing_is_mutated() -> None:
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        left = {n: torch.randn(3, generator=g) for n in "abc"}
        right = {n: torch.randn(3, generator=g) for n in "abc"}
        before = [{n: t.tolist() for n, t in tree.items()} for tree in (left, right)]
        trees.add(left, right, 0.3)
        trees.subtract(left, right)
        trees.scale(left, 3.0)
        trees.total([left, right, left])
        trees.norm(left)
        trees.select(left, ("a",)).pop("a")
        assert [{n: t.tolist() for n, t in tree.items()} for tree in (left, right)] == before


def test_a_clone_shares_no_memory_and_carries_no_gradient() -> None:
    source = {"a": torch.ones(2, requires_grad=True)}
    copy = trees.clone(source)
    assert not copy["a"].requires_grad
    copy["a"].fill_(9.0)
    assert source["a"].tolist() == [1.0, 1.0]


def test_subtracting_what_was_added_gives_back_the_left() -> None:
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        left = {n: torch.randn(4, generator=g, dtype=torch.float64) for n in "ab"}
        right = {n: torch.randn(4, generator=g, dtype=torch.float64) for n in "ab"}
        back = trees.subtract(trees.add(left, right), right)
        for name in left:
            torch.testing.assert_close(back[name], left[name])
        # ||c x|| = |c| ||x||
        assert trees.norm(trees.scale(left, -2.5)) == pytest.approx(2.5 * trees.norm(left))
