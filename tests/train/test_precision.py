"""Which precision a run computes in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fedfm.models import Loaded
from fedfm.spaces import LoRA
from fedfm.train import precision
from fedfm.train.precision import bf16_in_hardware
from tests.conftest import People
from tests.train.test_fused import SGD, both


@pytest.mark.parametrize(
    ("able", "fast"),
    [
        ({"avx2": True, "avx512_bf16": False}, False),
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({}, False),
    ],
)
def test_a_processor_with_instructions_for_it_is_told_by_them(
    able: dict[str, Any], fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    assert bf16_in_hardware("cpu") is fast


def test_a_version_of_torch_that_does_not_tell_means_no(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not precision.bf16_in_hardware()


@pytest.mark.parametrize("hardware", [False, True])
@pytest.mark.parametrize("asked", [None, False, True])
def test_the_hardware_decides_unless_the_user_does(
    llama: Loaded, people: People, asked: bool | None, hardware: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedfm.train.passes.bf16_in_hardware", lambda device: hardware)
    pair = both(llama, people, training=replace(SGD, bf16=asked), space=LoRA(r=2))
    for trainer in (pair.one, pair.many):
        assert trainer.bf16 is (hardware if asked is None else asked)
        with trainer.autocast():
            made = torch.ones(2, 2) @ torch.ones(2, 2)
        assert made.dtype == (torch.bfloat16 if trainer.bf16 else torch.float32)
