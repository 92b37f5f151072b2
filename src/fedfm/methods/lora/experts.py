"""Domain experts of the space ``experts``, as their names say; what their layers see.

Letters in shapes: R rank.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from fedfm.core import seeds
from fedfm.core.jobs import Job
from fedfm.core.method import Client
from fedfm.errors import ModelError
from fedfm.spaces.experts import AttachedExperts
from fedfm.tasks.task import collate

if TYPE_CHECKING:
    from fedfm.train.trainer import Trainer


class Expert(NamedTuple):
    """A domain expert of one layer: the name before ``.lora_A`` of the layer's shared expert, and a number from 1."""

    stem: str
    number: int

    @property
    def name(self) -> str:
        """Its name before ``.lora_A``."""
        return f"{self.stem}.expert{self.number}"


def expert(name: str) -> Expert | None:
    """The expert to which a tensor belongs; ``None`` for what is shared.

    >>> expert("layers.3.q_proj.expert2.lora_A.weight")
    Expert(stem='layers.3.q_proj', number=2)
    >>> expert("layers.3.q_proj.lora_A.weight")
    """
    found = re.fullmatch(r"(.+)\.expert(\d+)(\..*)?", name)
    return Expert(found[1], int(found[2])) if found else None


def counts(tensors: Mapping[str, object]) -> dict[str, int]:
    """How many experts each layer has; layers without any are left out."""
    found: dict[str, int] = {}
    for own in filter(None, map(expert, tensors)):
        found[own.stem] = max(own.number, found.get(own.stem, 0))
    return found


@dataclass(frozen=True)
class Embed(Job):
    """What the routers make of a client's tokens and of the experts that it holds, on average over tokens.

    Answered by tensors ``[R]``: $P \\bar x$ of each layer under the name of its router, ``STEM.router``, and
    $A_e \\bar x$ under that of each expert, where $\\bar x$ is the mean of what enters the layer. Both are linear, so
    these are the means of $P x$ and $A_e x$.

    Args:
        fraction: which part of the examples is looked at, at least one.
        split: of which the examples are.
    """

    fraction: float = 1.0
    split: str = "train"

    @torch.no_grad()
    def run(self, trainer: Trainer, client: Client) -> dict[str, torch.Tensor]:
        """One forward over some examples."""
        space, examples = trainer.space, trainer.examples(client, self.split)
        if not isinstance(space, AttachedExperts):
            raise ModelError("only the space experts has routers")
        draw = seeds.generator(trainer.seed, client.round, client.member.id, "embed")
        chosen = torch.randperm(len(examples), generator=draw)[: max(1, round(self.fraction * len(examples)))]
        space.load(self.tensors, self.patches)
        trainer.mode(training=False)
        sums: dict[str, torch.Tensor] = {}
        tokens: dict[str, torch.Tensor] = {}
        mask = torch.ones(0)

        def see(stem: str, x: torch.Tensor) -> None:
            real = (mask if x.dim() > 2 else torch.ones_like(x[:, 0])).to(x.device).float()  # not what is padding
            sums[stem] = sums.get(stem, torch.zeros(())) + (x.float() * real[..., None]).flatten(0, -2).sum(0).cpu()
            tokens[stem] = tokens.get(stem, torch.zeros(())) + real.sum().cpu()

        with space.watched(see), trainer.autocast():
            for few in chosen.split(trainer.training.per_device_eval_batch_size):
                batch = collate([examples[i] for i in few], trainer.pad, trainer.device)
                mask = batch.mask
                trainer.loaded.model(input_ids=batch.input_ids, attention_mask=batch.mask)
                trainer.pulse(0)
        found = {}
        for stem, mixture in space.mixtures.items():
            if stem in sums:
                own = {n: p.detach().cpu() for n, p in mixture.named(stem).items()}
                mean = sums[stem] / tokens[stem]
                found[f"{stem}.router"] = own[f"{stem}.router.weight"].float() @ mean
                names = [Expert(stem, e).name for e in mixture.held]
                found |= {name: own[f"{name}.lora_A.weight"].float() @ mean for name in names}
        return found
