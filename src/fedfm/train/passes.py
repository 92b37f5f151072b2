"""How rows pass through the model: batches, the task's losses, what is saved on the way, and what steps need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property
from operator import attrgetter
from typing import TYPE_CHECKING

import torch
from torch import nn

from fedfm.core import seeds
from fedfm.core.plan import Training
from fedfm.errors import DataError
from fedfm.spaces.space import Attached
from fedfm.tasks.task import Batch, Example, Losses, Task, TaskModel
from fedfm.train.dropout import Draws
from fedfm.train.packing import Packer, Packing
from fedfm.train.precision import bf16_in_hardware
from fedfm.train.trunk import Trunk

if TYPE_CHECKING:
    from fedfm.models import Loaded


class Passes:
    """The one model in memory, and rows that pass through it. What jobs of your own are made of.

    Args:
        loaded: model and tokenizer.
        space: the space attached to that model.
        task: loss and metrics.
        training: local training arguments.
        trunk: frozen lower blocks whose output is kept, if there are any.
        packer: gives the model batches without padding, if it can have them.
        seed: the run's seed.
    """

    def __init__(
        self,
        loaded: Loaded,
        space: Attached,
        task: Task,
        training: Training,
        *,
        trunk: Trunk | None = None,
        packer: Packer | None = None,
        seed: int = 0,
    ) -> None:
        self.loaded = loaded
        self.space = space
        self.task = task
        self.training = training
        self.seed = seed
        self.device = next(space.model.parameters()).device
        self.bf16 = bf16_in_hardware(self.device) if training.bf16 is None else training.bf16
        split = loaded.split
        body, head = (attrgetter(split.body), attrgetter(split.head)) if split else (None, None)
        self.model = TaskModel(loaded.model, body and body(loaded.model), head and head(loaded.model))
        self.trunk = trunk
        self.packer = packer
        self.pad = loaded.tokenizer.pad_token_id if loaded.tokenizer is not None else 0
        """With what token ids are filled up."""
        self._short = False

    def logits(self, examples: list[Example], batch: Batch, draws: Draws | None = None) -> torch.Tensor:
        """Class scores of a batch, ``[B, K]``."""
        if batch.target.dim() != 1:
            raise DataError(f"class scores are for classification; the task {self.task.id!r} has no classes")
        with self._cheaply(examples, batch, draws=draws):
            batch = batch.to(self.device)
            return self.task.scores(self.model, batch)

    def losses(
        self,
        examples: list[Example],
        batch: Batch,
        rows: Sequence[int] | None = None,
        draws: Draws | None = None,
        held_out: bool = False,
    ) -> Losses:
        """The task's losses.

        Args:
            examples: of the batch.
            batch: the same, padded, in the processor's memory.
            rows: of each client; one client's unless given.
            draws: dropout masks; from torch's own generator unless given.
            held_out: whether all is measured that the task measures of held-out rows.
        """
        with self._cheaply(examples, batch, rows, draws):
            judge = self.task.measure if held_out else self.task.losses
            return judge(self.model, batch.to(self.device))

    @contextmanager
    def _cheaply(
        self, examples: list[Example], batch: Batch, rows: Sequence[int] | None = None, draws: Draws | None = None
    ) -> Iterator[None]:
        """Within it, the model runs from the lowest tuned block on where what enters it is kept, without padding, in
        bfloat16, as far as each may be."""
        with ExitStack() as stack:
            stack.enter_context(self.autocast())
            if self.trunk and not self._short:
                stack.enter_context(self.trunk.skipped(self.trunk.of(examples)))
            packing = self._packing(batch, rows, draws)
            if self.packer and packing:
                stack.enter_context(self.packer.packed(packing, self.trunk.first if self.trunk else 0))
            if draws is not None:
                stack.enter_context(draws)
            yield

    def _packing(self, batch: Batch, rows: Sequence[int] | None, draws: Draws | None) -> Packing | None:
        """How a batch is packed; ``None`` when it is not, because little would be saved."""
        if self.packer is None or self._short or self.space.by_row or (len(batch.lengths) == 1 and draws is None):
            return None
        packing = Packing.of(batch, rows or [len(batch.lengths)], self.packer.looks_back, draws, self.device)
        if draws is not None:
            draws.packing = packing
        return packing if packing.pays() else None

    @cached_property
    def _random(self) -> bool:
        """Whether training draws dropout masks."""
        config = vars(self.loaded.model.config).items()
        return any(isinstance(m, nn.Dropout) and m.p > 0 for m in self.space.model.modules()) or any(
            # The dropout of summaries belongs to a head of GPT-2 that no task here has.
            "drop" in name and not name.startswith("summary") and isinstance(value, float) and value > 0
            for name, value in config
        )

    def _draws(self, names: Sequence[tuple[int, str, str]]) -> Draws | None:
        """Dropout masks of clients, by (round, client, purpose); ``None`` where the model draws them in its own way."""
        if not self._random or self.packer is None or self._short:
            return None
        found = []
        for name in names:
            draw = torch.Generator(self.device)
            draw.manual_seed(seeds.derive(self.seed, *name, "dropout"))
            found.append(draw)
        return Draws(found)

    def chunks(self, examples: list[Example]) -> list[list[int]]:
        """Indices in batches of similar length."""
        order = sorted(range(len(examples)), key=lambda i: len(examples[i]))
        size = self.training.per_device_eval_batch_size
        return [order[at : at + size] for at in range(0, len(order), size)]

    @staticmethod
    def _supervised(target: torch.Tensor) -> int:
        """Supervised positions: of classes ``[B]`` all, of next tokens ``[B, T]`` those after the first."""
        return len(target) if target.dim() == 1 else int((target[:, 1:] != -100).sum())

    def optimizer(self, parameters: list[torch.nn.Parameter], rate: float) -> torch.optim.Optimizer:
        """A fresh optimizer of the run's kind."""
        args = self.training
        if args.optim == "sgd":
            return torch.optim.SGD(parameters, lr=rate, weight_decay=args.weight_decay)
        return torch.optim.AdamW(
            parameters,
            lr=rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
            fused=True,
        )

    def mode(self, training: bool) -> None:
        """Whether dropout is drawn."""
        # Walking all modules costs as much as a small step, so it is done only when the mode changes.
        if self.loaded.model.training != training:
            self.loaded.model.train(training)

    def autocast(self) -> AbstractContextManager[None]:
        """Within it, products are of bfloat16 where the run has that."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def cuda(self) -> list[torch.device]:
        """The devices beside the processor whose random numbers are drawn."""
        return [self.device] if self.device.type == "cuda" else []
