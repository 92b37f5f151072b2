"""Shapes of uploads whose LoRA factors may have a rank of their own."""

from __future__ import annotations

import pytest
import torch

from fedfm.core.update import Kind, Update
from fedfm.errors import BadUpdate
from fedfm.wire.admit import Limits, admit, at_rank

A, B = "q.lora_A.weight", "q.lora_B.weight"
WIDEST = {A: torch.zeros(4, 6), B: torch.zeros(5, 4), "head.weight": torch.zeros(2, 5)}


def check(**tensors: torch.Tensor) -> None:
    update = Update({A: tensors["a"], B: tensors["b"], "head.weight": tensors.get("head", torch.zeros(2, 5))})
    admit(update, Kind.DELTA, at_rank(update, WIDEST), Limits())


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_any_rank_up_to_the_widest_is_right(rank: int) -> None:
    check(a=torch.zeros(rank, 6), b=torch.zeros(5, rank))


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        ((5, 6), (5, 5), "has rank 5, not one from 1 to 4"),
        ((0, 6), (5, 0), "has rank 0, not one from 1 to 4"),
        ((2, 7), (5, 2), r"has shape \[2, 7\], not \[2, 6\]"),
        ((2, 6), (5, 3), r"has shape \[5, 3\], not \[5, 2\]"),
        ((2, 6), (9, 2), r"has shape \[9, 2\], not \[5, 2\]"),
        ((), (5, 2), "has rank 0"),
    ],
)
def test_other_shapes_are_refused(a: tuple[int, ...], b: tuple[int, ...], words: str) -> None:
    with pytest.raises(BadUpdate, match=words):
        check(a=torch.zeros(a), b=torch.zeros(b))


def test_the_head_has_its_own_shape() -> None:
    with pytest.raises(BadUpdate, match=r"head\.weight"):
        check(a=torch.zeros(2, 6), b=torch.zeros(5, 2), head=torch.zeros(2, 4))
