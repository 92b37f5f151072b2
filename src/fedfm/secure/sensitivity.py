"""How much an upload tells of a client's labels, coordinate by coordinate: the map by which FedML-HE chooses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fedfm.core.jobs import Fit, Job
from fedfm.core.method import Client
from fedfm.core.trees import Patterns
from fedfm.core.update import Tensors, Update
from fedfm.tasks.task import collate

if TYPE_CHECKING:
    from fedfm.train.trainer import Trainer


@dataclass(frozen=True)
class Sensitivity(Job):
    """$S_m = \\frac{1}{K} \\sum_k |\\partial^2 \\ell(x_k, y_k, w) / \\partial w_m \\partial y_k|$ over K
    examples.

    Cross-entropy is linear in the label: $\\ell = -\\sum_c y_c \\log p_c$. So the derivative by the entry of the
    true class is $-\\partial \\log p_y / \\partial w_m$, the gradient of the example's own loss. Of the label's
    entries only that one is taken; those of other classes would cost a backward pass each, and a language model has
    as many classes as tokens.

    Weights are those after a training of the run's length: LoRA begins with $B = 0$, where all of A has no gradient.

    Args:
        train: which names get gradients.
        like: names and shapes of the upload.
        examples: K, of the client's training rows, drawn at random; all where there are fewer.

    What is uploaded and is no tuned tensor counts as most sensitive.
    """

    train: Patterns
    like: Tensors
    examples: int

    def run(self, trainer: Trainer, client: Client) -> Update:
        """The map of a client, with its number of examples."""
        trained = trainer.answer(Fit(self.tensors, train=self.train, purpose="sensitivity"), client).tensors
        rows = trainer.examples(client, "train")
        trainer.space.load(trained)
        chosen = trainer.space.train_only(self.train)
        trainer.mode(training=False)
        found = {name: torch.zeros_like(parameter) for name, parameter in chosen.items()}
        for place in torch.randperm(len(rows), generator=client.draw("sensitivity"))[: self.examples].tolist():
            batch = collate([rows[place]], trainer.pad)
            loss = trainer.losses([rows[place]], batch).total.sum() / trainer._supervised(batch.target)
            loss.backward()
            for name, parameter in chosen.items():
                if parameter.grad is not None:
                    found[name] += parameter.grad.abs()
                    parameter.grad = None
            trainer.pulse(0)
        return Update(self._as_uploaded(found, trainer.space.parameters), weight=client.member.examples)

    def _as_uploaded(self, found: Tensors, tuned: Tensors) -> dict[str, torch.Tensor]:
        """The map under the names of the upload, whose largest value is 1."""
        largest = max((float(tensor.max()) for tensor in found.values()), default=0.0) or 1.0
        out = {}
        for name, tensor in self.like.items():
            plain = name.rpartition(":")[2]
            if plain in found and found[plain].shape == tensor.shape:
                out[name] = found[plain].float() / largest
            else:
                frozen = plain in tuned and tuned[plain].shape == tensor.shape
                out[name] = torch.full(tensor.shape, 0.0 if frozen else 1.0)
        return out
