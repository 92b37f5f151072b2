"""Adaptive clipping: Andrew, Thakkar, McMahan, Ramaswamy 2021, Differentially Private Learning with Adaptive Clipping,
NeurIPS 2021 (arXiv 1905.03871).

The bound of the uploads follows a quantile of their norms. Each client says, by a bit beside its upload, whether it was
below the bound; the server moves the bound by the share of such clients, to which it has added noise.

The bits are part of the account: the noise on the mean is raised so that both releases together spend what one release
with the noise multiplier of the ``gaussian`` stage would spend.

Differences from the paper:
- The noise on the sum of the bits is a twentieth of the expected number of participants, as in the paper, but at least
  the noise multiplier $z$, so that the noise on the mean is raised by 15 percent at most in small federations, too.
- A client that does not come counts as a half, as the sum is divided by the expected number.
- The server clips once more what arrives, by the bound that it told the clients. Where uploads are summed unseen it
  cannot; the bits are then a coordinate of what is summed, as in the paper, and the server sees their sum alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch

from fedfm.core import trees
from fedfm.core.method import Paper
from fedfm.core.update import Tensors, Update
from fedfm.errors import BadUpdate, RecipeError, require
from fedfm.wire.clip import Clip
from fedfm.wire.gaussian import Gaussian
from fedfm.wire.stage import Sender, Setting

BELOW = "adaptive-clip-below"
"""Name of the bit: a half if the upload was within the bound, else minus a half; so it changes the sum by a half."""


@dataclass(frozen=True)
class AdaptiveClip(Clip):
    """$S \\leftarrow S \\exp(-\\eta (\\tilde b - \\gamma))$ with $\\tilde b = \\frac{1}{\\bar m} (\\sum_k (b_k -
    \\frac{1}{2}) + \\mathcal{N}(0, \\sigma_b^2)) + \\frac{1}{2}$, where $b_k$ is 1 if $\\lVert \\Delta_k \\rVert \\le
    S$ and $\\bar m$ is the expected number of participants. The noise multiplier of the mean becomes $z_\\Delta =
    (z^{-2} - (2 \\sigma_b)^{-2})^{-1/2}$.

    Args:
        max_norm: $S$ in the first round.
        quantile: $\\gamma$, the share of the uploads that should be within the bound.
        learning_rate: $\\eta$.
        bit_noise: $\\sigma_b$; 0 means the larger of $\\bar m / 20$ and $z$.
    """

    paper: ClassVar[Paper | None] = Paper(
        title="Differentially Private Learning with Adaptive Clipping",
        authors="Andrew, Thakkar, McMahan, Ramaswamy",
        year=2021,
        venue="NeurIPS",
        arxiv="1905.03871",
    )
    id: ClassVar[str] = "adaptive-clip"
    beside: ClassVar[tuple[str, ...]] = (BELOW,)

    max_norm: float = 0.1
    quantile: float = 0.5
    learning_rate: float = 0.2
    bit_noise: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "quantile", 0 < self.quantile < 1, "above 0 and below 1")
        require(self, "learning_rate", 0 < self.learning_rate < math.inf, "above 0 and finite")
        require(self, "bit_noise", 0 <= self.bit_noise < math.inf, "above 0 and finite, or 0 to choose it")

    def at(self, memory: Tensors) -> Self:
        return replace(self, max_norm=float(memory["max_norm"])) if memory else self

    def told(self) -> Tensors:
        return {"max_norm": torch.tensor(self.max_norm, dtype=torch.float64)}

    def fits(self, setting: Setting) -> None:
        later = setting.stages[setting.place(self) + 1 :]
        if len(later) != 1 or not isinstance(later[0], Gaussian):
            raise RecipeError(
                "AdaptiveClip must stand directly before Gaussian, at the end of stages: all are told its bound, which "
                "follows the clients' norms, so noise must hide them. Use Clip elsewhere."
            )
        if later[0].summed:
            raise RecipeError(
                f"AdaptiveClip moves its bound by bits to whose sum the server adds noise, which "
                f"{type(later[0]).__name__} does without. Use Clip, or gaussian instead of {later[0].id}."
            )
        if later[0].noise_multiplier:
            self.raised(later[0].noise_multiplier, setting)

    def raised(self, noise_multiplier: float, setting: Setting) -> float:
        """$z_\\Delta$.

        Raises:
            RecipeError: the bits alone would spend more than there is.
        """
        most = 2 * self._bit_noise(setting)
        if noise_multiplier >= most:
            raise RecipeError(
                f"AdaptiveClip bit_noise must be above half of the noise_multiplier of Gaussian, {noise_multiplier}, "
                f"but is {most / 2}: the bits alone would spend more. Raise it, or leave it at 0."
            )
        return (noise_multiplier**-2 - most**-2) ** -0.5

    def send(self, update: Update, sender: Sender) -> Update:
        below = trees.norm(update.tensors) <= self.max_norm
        clipped = super().send(update, sender)
        return replace(clipped, tensors={**clipped.tensors, BELOW: torch.tensor(0.5 if below else -0.5)})

    def receive(self, update: Update, like: Tensors | None) -> Update:
        bit = update.tensors.get(BELOW)
        if bit is None or bit.numel() != 1 or abs(float(bit)) != 0.5:
            raise BadUpdate(f"the number {BELOW!r} beside its upload is neither a half nor minus a half")
        rest = {name: tensor for name, tensor in update.tensors.items() if name != BELOW}
        clipped = super().receive(replace(update, tensors=rest), like)
        return replace(clipped, tensors={**clipped.tensors, BELOW: bit})

    def release(self, mean: Update, setting: Setting, draw: torch.Generator) -> Update:
        noise = float(torch.randn((), generator=draw, dtype=torch.float64)) * self._bit_noise(setting)
        share = (float(setting.beside.get(BELOW, 0.0)) + noise) / setting.expected + 0.5
        new = self.max_norm * math.exp(-self.learning_rate * (share - self.quantile))
        setting.keep(self, {"max_norm": torch.tensor(new, dtype=torch.float64)})
        return mean

    def _bit_noise(self, setting: Setting) -> float:
        """$\\sigma_b$."""
        if self.bit_noise:
            return self.bit_noise
        z = max(stage.noise_multiplier for stage in setting.stages if isinstance(stage, Gaussian))
        return max(setting.expected / 20, z)
