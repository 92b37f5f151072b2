"""A space put into a model: named parameters that can be set, read, frozen and saved."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from fedfm.core import trees
from fedfm.core.update import Tensors
from fedfm.errors import ModelError

if TYPE_CHECKING:
    from fedfm.models import Loaded


class Space(ABC):
    """What is tuned. Subclasses are frozen dataclasses of the space's own settings."""

    id: ClassVar[str]

    @abstractmethod
    def attach(self, loaded: Loaded, seed: int) -> Attached:
        """Put the space into the model.

        Args:
            loaded: the model; it is changed in place until :meth:`Attached.detach`.
            seed: seed of the initial values that are drawn.

        Raises:
            ModelError: the space does not fit the model.
        """


class Attached:
    """A space in a model. Holds the only copy of the model's weights; clients' tensors are copied in and out.

    Args:
        model: the module to run; the space's parameters take part in its forward.
        parameters: the tuned parameters by their public names.
        save: writes the model's present tensors to a folder.
        detach: takes the space out of the model again.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        save: Callable[[Path], None],
        detach: Callable[[], object],
    ) -> None:
        self.model = model
        self.parameters = dict(parameters)
        self.initial: Tensors = {name: p.detach().clone() for name, p in parameters.items()}
        self._save = save
        self._detach = detach
        self._all = [p.detach() for p in self.parameters.values()]

    def load(self, tensors: Tensors) -> None:
        """Set the tuned parameters; absent names take their initial value."""
        if unknown := [name for name in tensors if name not in self.parameters]:
            raise ModelError(f"the space has no tensor {unknown[0]!r} ({len(unknown)} unknown names)")
        source = [tensors.get(name, first) for name, first in self.initial.items()]
        torch._foreach_copy_(self._all, [t.to(p.device) for t, p in zip(source, self._all, strict=True)])

    def read(self) -> dict[str, torch.Tensor]:
        """Copies of the tuned parameters as they are now."""
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    def train_only(self, patterns: trees.Patterns) -> dict[str, nn.Parameter]:
        """Let gradients reach the parameters that ``patterns`` mean, and no others; returns them.

        Raises:
            ModelError: the patterns mean no parameter.
        """
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(trees.matches(name, patterns))
            parameter.grad = None
        if chosen := {n: p for n, p in self.parameters.items() if p.requires_grad}:
            return chosen
        raise ModelError(
            f"no tensor of the space matches {', '.join(patterns)}; "
            f"it has names such as {next(iter(self.parameters))!r}"
        )

    def save(self, tensors: Tensors, folder: Path) -> None:
        """Write ``tensors`` as the files that ``peft`` or ``transformers`` read."""
        self.load(tensors)
        self._save(folder)

    def detach(self) -> None:
        """Take the space out of the model, which then is as it was before."""
        self.load({})
        self._detach()
