"""A model's output on one batch of many clients, handed out a client at a time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from fedfm.tasks.task import Batch
from fedfm.train.stacked import Unstackable


class Ran(Exception):
    """The model ran, and its output is kept; the task's own work need not be done."""


class Taken(nn.Module):
    """Stands for a model: runs it once on a batch of many clients, then hands out the rows of one client each time.

    Args:
        inner: the model.
        batch: what it is expected to be called with.
    """

    def __init__(self, inner: nn.Module, batch: Batch) -> None:
        super().__init__()
        self.inner = inner
        self.batch: Any = batch
        self.part: Any = None
        self._output: Any = None

    def show(self, batch: Batch, part: slice) -> None:
        """From now on, hand out the rows ``part`` when called with ``batch``."""
        self.batch, self.part = batch, part

    def forward(self, **inputs: Any) -> Any:
        if inputs.get("input_ids") is not self.batch.input_ids or (self.part and self._output is None):
            raise Unstackable("the task calls the model with something else than its batch")
        if self.part is None:
            self._output = self.inner(**inputs)
            raise Ran
        own = {k: v[self.part] for k, v in self._output.items() if torch.is_tensor(v)}
        return SimpleNamespace(**own)
