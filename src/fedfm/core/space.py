"""What a method knows of the tuned tensors: their names, shapes and initial values. No model needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from fedfm.core.update import Tensors


class Layout(Protocol):
    """The tensors that a space tunes."""

    initial: Tensors
    """Their values before training; the same for every client, drawn from the run's seed."""


@dataclass(frozen=True)
class Fixed:
    """A layout given by its initial tensors alone, for servers without a model and for tests."""

    initial: Tensors
