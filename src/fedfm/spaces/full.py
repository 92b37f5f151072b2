"""Full fine-tuning: every parameter of the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from fedfm.spaces.space import Attached, Space

if TYPE_CHECKING:
    from fedfm.models import Loaded


@dataclass(frozen=True)
class Full(Space):
    """Every parameter of the model, under the model's own names; tied weights count once."""

    id: ClassVar[str] = "full"

    def attach(self, loaded: Loaded, seed: int) -> Attached:
        model = loaded.model

        def save(folder: Path) -> None:
            model.save_pretrained(folder)
            if loaded.tokenizer is not None:
                loaded.tokenizer.save_pretrained(folder)

        return Attached(model, dict(model.named_parameters()), save, detach=lambda: model.requires_grad_(False))
