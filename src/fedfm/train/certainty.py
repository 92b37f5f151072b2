"""Jobs that ask how a model sees single examples: how sure it is of its answers, how steeply its loss depends on each
weight.

Letters in shapes: N examples of a split, B of a batch, T tokens, K classes or words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fedfm.core.jobs import Job
from fedfm.core.method import Client
from fedfm.core.trees import Patterns
from fedfm.core.update import Tensors
from fedfm.tasks.task import collate

if TYPE_CHECKING:
    from fedfm.train.trainer import Trainer


@dataclass(frozen=True)
class Entropy(Job):
    """The entropy of what the model answers to each example, in nats, ``[N]``, in the order of the split.

    Of a classifier that of the distribution over classes; of a language model the mean over the tokens that it reads.

    Args:
        split: which examples.
    """

    split: str = "train"

    @torch.no_grad()
    def run(self, trainer: Trainer, client: Client) -> torch.Tensor:
        """Run the model without dropout."""
        examples = trainer.examples(client, self.split)
        trainer.space.load(self.tensors, self.patches)
        trainer.mode(training=False)
        found = torch.zeros(len(examples))
        for chunk in trainer.chunks(examples):
            chosen = [examples[i] for i in chunk]
            if chosen[0].target.dim() == 0:
                found[chunk] = uncertainty(trainer.logits(chosen, collate(chosen, trainer.pad))).cpu()
            else:
                # One by one: scores of all words at all tokens of a batch would take much memory.
                for i in chunk:
                    batch = collate([examples[i]], trainer.pad, trainer.device)
                    with trainer.autocast():
                        logits = trainer.loaded.model(**trainer.task.inputs(batch)).logits
                    found[i] = uncertainty(logits).mean().cpu()
            trainer.pulse(0)
        return found


@dataclass(frozen=True)
class Fisher(Job):
    """The diagonal of the empirical Fisher information, by name: the mean over examples of the squared gradient of each
    example's mean loss.

    Args:
        train: with regard to which tensors.
        split: which examples.
    """

    train: Patterns = ("*",)
    split: str = "train"

    def run(self, trainer: Trainer, client: Client) -> Tensors:
        """One gradient for each example, without dropout."""
        examples = trainer.examples(client, self.split)
        trainer.space.load(self.tensors, self.patches)
        chosen = trainer.space.train_only(self.train)
        trainer.mode(training=False)
        found = {name: torch.zeros_like(parameter) for name, parameter in chosen.items()}
        for example in examples:
            losses = trainer.losses([example], collate([example], trainer.pad))
            (losses.total / losses.count).sum().backward()
            for name, parameter in chosen.items():
                if parameter.grad is not None:
                    found[name] += parameter.grad.square() / len(examples)
                    parameter.grad = None
            trainer.pulse(0)
        trainer.space.train_only(self.train)
        return {name: tensor.detach() for name, tensor in found.items()}


def uncertainty(logits: torch.Tensor) -> torch.Tensor:
    """$-\\sum_k p_k \\ln p_k$ of the distributions with these logits, ``[..., K]`` to ``[...]``.

    >>> uncertainty(torch.zeros(1, 2))
    tensor([0.6931])
    """
    logs = logits.float().log_softmax(dim=-1)
    return -(logs.exp() * logs).sum(dim=-1)
