"""The full space: initial values on disk."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch

from fedfm.models import load
from fedfm.spaces import Full
from fedfm.spaces.full import Stored


def test_initial_values_are_read_one_at_a_time(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a model would be in memory twice whenever a client begins from it."""
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    read = Stored.__getitem__

    def counted(self: Stored, name: str) -> torch.Tensor:
        nonlocal most
        most = max(most, 1 + sum(ref() is not None for ref in alive))
        value = read(self, name)
        alive.append(weakref.ref(value))
        return value

    attached = Full().attach(load(str(llama_folder), head="causal_lm"), 0)
    before = attached.read()
    for parameter in attached.parameters.values():
        parameter.data.add_(1.0)
    monkeypatch.setattr(Stored, "__getitem__", counted)
    attached.load({})
    assert all(torch.equal(attached.parameters[n], t) for n, t in before.items())
    assert len(alive) == len(before)
    assert most <= 2  # the one that is read, and the one before it until its name is taken
