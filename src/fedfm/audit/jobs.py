"""What attacks compute on a model that is theirs to look into: words one by one, answers to a shaken input, gradients
of single rows.

Letters in shapes: N rows, S supervised positions of a row, B rows of a batch, T tokens, D width, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from fedfm.core import seeds
from fedfm.core.jobs import Job
from fedfm.core.method import Client
from fedfm.core.trees import wide
from fedfm.core.update import Tensors
from fedfm.tasks.causal_lm import NextToken
from fedfm.tasks.task import IGNORE, collate

if TYPE_CHECKING:
    from fedfm.train.trainer import Trainer

CHUNK = 128
"""Positions whose logits are held at once."""


@dataclass(frozen=True)
class Said:
    """What a language model made of a row.

    Args:
        wanted: the supervised tokens, ``[S]``.
        nats: $-\\log p$ of each, after the real ones before it, ``[S]``.
        right: whether each was the likeliest, ``[S]``. As long as all before it are, this is the greedy continuation.
    """

    wanted: torch.Tensor
    nats: torch.Tensor
    right: torch.Tensor


@dataclass(frozen=True)
class Words(Job):
    """Each row's supervised tokens, one by one: a list of :class:`Said`. For tasks that predict the next token."""

    def run(self, trainer: Trainer, client: Client) -> list[Said]:
        """The answer."""
        task = trainer.task
        assert isinstance(task, NextToken)
        examples = trainer.encoded(client.member.id, "train")
        found: list[Any] = [None] * len(examples)
        trainer.space.load(self.tensors, self.patches)
        trainer.mode(training=False)
        for chunk in trainer.chunks(examples):
            chosen = [examples[i] for i in chunk]
            batch = collate(chosen, trainer.pad).to(trainer.device)
            wanted = batch.target.flatten()[batch.places + 1]
            with torch.no_grad(), trainer.autocast():
                nats, right = _judged(trainer, batch, wanted)
            counts = (batch.target[:, 1:] != IGNORE).sum(1).tolist()
            parts = (t.cpu().split(counts) for t in (wanted, nats, right))
            for i, (words, lost, hits) in zip(chunk, zip(*parts, strict=True), strict=True):
                found[i] = Said(words, lost, hits)
        return found


def _judged(trainer: Trainer, batch: Any, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses of the wanted tokens and whether they are the likeliest, over the supervised positions of a batch."""
    task, model = trainer.task, trainer.model
    assert isinstance(task, NextToken)
    if model.body is not None and model.head is not None:
        states, head = task.states(model, batch), model.head
    else:
        states, head = model.model(**task.inputs(batch), use_cache=False).logits.flatten(0, 1)[batch.places], None
    parts = []
    for part, words in zip(states.split(CHUNK), wanted.split(CHUNK), strict=True):
        logits = (head(part) if head else part).float()  # [s, V]
        lost = logits.logsumexp(1) - logits.gather(1, words[:, None])[:, 0]
        parts.append((lost, logits.argmax(1) == words))
    return torch.cat([lost for lost, _ in parts]), torch.cat([hits for _, hits in parts])


@dataclass(frozen=True)
class Shaken(Job):
    """The answer to another job while noise is added to what the model reads: to the embeddings of tokens, or of the
    patches of an image.

    Args:
        job: the other one.
        seed: of the noise. The same seed gives the same noise.
        scale: its standard deviation, relative to the root mean square of a row's embeddings; may be negative, which
            turns the noise around.
    """

    tensors: Tensors = field(default_factory=dict)
    job: Job = field(kw_only=True)
    seed: int = field(kw_only=True)
    scale: float = field(kw_only=True)

    def run(self, trainer: Trainer, client: Client) -> Any:
        """The answer of the other job."""
        with shaken(trainer.loaded.model, self.seed, self.scale):
            return trainer.answer(self.job, client)


@contextmanager
def shaken(model: Any, seed: int, scale: float) -> Iterator[None]:
    """Within it, a model reads its embeddings with noise, see :class:`Shaken`."""
    draw = torch.Generator().manual_seed(seed)

    def add(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(output.shape, generator=draw).to(output)  # [B, T, D]
        return output + scale * output.float().pow(2).mean((1, 2), keepdim=True).sqrt().to(output) * noise

    handle = model.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class Toward(Job):
    """How the gradient of each row's loss, in nats per supervised position, lies to a change of the tensors.

    The answer is ``[N, 3]``: the inner product $\\langle g, \\Delta \\rangle$, $\\lVert g \\rVert$ and
    $\\lVert \\Delta \\rVert$, over the names in ``change``.

    Args:
        change: $\\Delta$.
    """

    change: Tensors = field(kw_only=True)

    def run(self, trainer: Trainer, client: Client) -> torch.Tensor:
        """The answer."""
        trainer.space.load(self.tensors, self.patches)
        chosen = trainer.space.train_only(tuple(self.change))
        change = {name: wide(self.change[name]).to(trainer.device) for name in chosen}
        length = sum(float(t.double().pow(2).sum()) for t in change.values()) ** 0.5
        trainer.mode(training=False)
        found = []
        for example in trainer.encoded(client.member.id, "train"):
            losses = trainer.losses([example], collate([example], trainer.pad))
            (losses.total / losses.count.clamp_min(1)).sum().backward()
            own = {name: wide(p.grad) for name, p in chosen.items() if p.grad is not None}
            dot = sum(float((own[name] * change[name]).double().sum()) for name in own)
            norm = sum(float(g.double().pow(2).sum()) for g in own.values()) ** 0.5
            found.append((dot, norm, length))
            for p in chosen.values():
                p.grad = None
        trainer.space.train_only(tuple(self.change))
        return torch.tensor(found, dtype=torch.float64)


@dataclass(frozen=True)
class Entering(Job):
    """What enters a layer of the model for each row: a list of ``[T, D]``, of its real positions.

    Args:
        layer: the module's name.
    """

    layer: str = field(kw_only=True)

    def run(self, trainer: Trainer, client: Client) -> list[torch.Tensor]:
        """The answer."""
        trainer.space.load(self.tensors, self.patches)
        trainer.mode(training=False)
        found: list[torch.Tensor] = []

        def note(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            found.append(inputs[0].detach()[0].float().cpu())

        handle = trainer.loaded.model.get_submodule(self.layer).register_forward_pre_hook(note)
        try:
            with torch.no_grad():
                for example in trainer.encoded(client.member.id, "train"):
                    trainer.losses([example], collate([example], trainer.pad))
        finally:
            handle.remove()
        return found


@dataclass(frozen=True)
class Sampled(Job):
    """A continuation of each prompt, drawn word by word from the model's own probabilities.

    Args:
        prompts: as a person would write them; the task renders them.
        max_new_tokens: of each continuation, at most.
        seed: of the draws.
    """

    prompts: Sequence[str] = field(kw_only=True)
    max_new_tokens: int = field(kw_only=True)
    seed: int = field(kw_only=True)

    def run(self, trainer: Trainer, client: Client) -> list[str]:
        """The answer."""
        tokenizer, found = trainer.loaded.tokenizer, []
        trainer.space.load(self.tensors, self.patches)
        trainer.mode(training=False)
        with torch.random.fork_rng(devices=trainer.cuda()), torch.no_grad(), trainer.autocast():
            seeds.seed_torch(self.seed, trainer.device)
            for prompt in self.prompts:
                text = trainer.task.render(prompt, trainer.loaded)
                inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False).to(trainer.device)
                output = trainer.loaded.model.generate(
                    **inputs,
                    max_new_tokens=self.max_new_tokens,
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    pad_token_id=trainer.pad,
                )
                found.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
        return found
