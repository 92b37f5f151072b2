"""The sequential trainer: answers the jobs of one client at a time on the one model in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import singledispatchmethod
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from fedfm.core import seeds, trees
from fedfm.core.jobs import (
    Call,
    Features,
    Fit,
    Fitted,
    Generate,
    Gradient,
    Gradients,
    Job,
    Loss,
    Predict,
    Scores,
)
from fedfm.core.method import Client
from fedfm.core.plan import Members, Training
from fedfm.core.update import Tensors
from fedfm.errors import DataError, FedfmError
from fedfm.privacy.dp_sgd import DPSGD
from fedfm.spaces.space import Attached
from fedfm.tasks.task import Example, Task, collate
from fedfm.train import private
from fedfm.train.batches import Encoded, batches
from fedfm.train.depth import shortened
from fedfm.train.held import Held
from fedfm.train.packing import Packer
from fedfm.train.passes import Passes
from fedfm.train.trunk import Trunk

if TYPE_CHECKING:
    from fedfm.models import Loaded


def _no_pulse(steps: int) -> None:
    """Nobody watches."""


class Trainer(Passes):
    """Answers jobs with the plain loop: load the client's tensors, run its batches, read the tensors back.

    The optimizer state is fresh in each ``Fit``, as in FedAvg. Random draws (batches, dropout) are functions of
    (seed, round, client, purpose of the job).

    Args:
        loaded: model and tokenizer.
        space: the space attached to that model.
        task: loss and metrics.
        training: local training arguments.
        data: clients' rows.
        trunk: frozen lower blocks whose output is kept, if there are any.
        packer: gives the model batches without padding, if it can have them.
        public: rows that the server and all clients have, the split ``public``.
        privacy: how single training examples are protected; then no other job may look at them.
        seed: the run's seed.
        secret: seed of what nobody else may be able to draw again; the run's seed unless given.
        rounds: rounds of the run, for the learning-rate schedule.
        pulse: called with the number of optimizer steps done since the last call; may raise to stop the work.
    """

    def __init__(
        self,
        loaded: Loaded,
        space: Attached,
        task: Task,
        training: Training,
        data: Members,
        *,
        trunk: Trunk | None = None,
        packer: Packer | None = None,
        public: Sequence[Mapping[str, Any]] = (),
        privacy: DPSGD | None = None,
        seed: int = 0,
        secret: int | None = None,
        rounds: int = 1,
        pulse: Callable[[int], None] = _no_pulse,
    ) -> None:
        # Rows that share a sequence have no gradients of their own.
        packer = None if privacy else packer
        super().__init__(loaded, space, task, training, trunk=trunk, packer=packer, seed=seed)
        self.data = data
        self.privacy = privacy
        self.secret = seed if secret is None else secret
        self.rounds = rounds
        self.pulse = pulse
        self.public = public
        self.instead: Mapping[tuple[str, str], str] = {}
        """By (client, split), the split that is meant instead: in simulations of clients that poison their rows."""
        self._encoded: Callable[[str, str], list[Example]] = Encoded(
            lambda client, part: task.encode(self.rows(client, part), loaded)
        )

    @property
    def group(self) -> int:
        """How many clients' jobs are worth asking together."""
        return 1

    def answers(self, asked: Sequence[tuple[Job, Client]]) -> list[Any]:
        """The answers to jobs of several clients, in the order asked."""
        return [self.answer(job, client) for job, client in asked]

    def rows(self, client: str, split: str) -> Sequence[Mapping[str, Any]]:
        """The rows of one split of a client.

        Raises:
            DataError: the run has no public rows.
        """
        if split != "public":
            return self.data.rows(client, self.instead.get((client, split), split))
        if not len(self.public):
            raise DataError("there are no public rows. Give the run some: data.public: 0.05, for one row in twenty.")
        return self.public

    def encoded(self, client: str, split: str) -> list[Example]:
        """The tokenised examples of a split, or of several joined by ``+``."""
        parts = [self.instead.get((client, part), part) for part in split.split("+")]
        # All share the public rows, so they are tokenised once.
        lists = [self._encoded("" if part == "public" else client, part) for part in parts]
        return lists[0] if len(lists) == 1 else [example for one in lists for example in one]

    @contextmanager
    def given(self, client: Client, examples: list[Example], split: str = "train") -> Iterator[None]:
        """Within it, a client has these examples of a split instead of its own."""
        own, key = self._encoded, (client.member.id, self.instead.get((client.member.id, split), split))
        self._encoded = lambda id, part: examples if (id, part) == key else own(id, part)
        try:
            yield
        finally:
            self._encoded = own

    def steps(self, job: Fit, client: Client, examples: int) -> int:
        """Optimizer steps of a job on so many examples."""
        if job.max_steps is not None:
            return job.max_steps
        return max(1, round(self.training.steps(examples) * client.member.profile.get("work", 1.0)))

    def footprint(self, tuned: Tensors, train: trees.Patterns) -> int:
        """Bytes of the model with these tuned tensors, and of gradients and moments of those that are trained."""
        copies = 1 + (0 if self.training.optim == "sgd" else 2)
        own = {id(p) for p in self.space.parameters.values()}
        frozen = sum(p.numel() * p.element_size() for p in self.loaded.model.parameters() if id(p) not in own)
        return frozen + trees.nbytes(tuned) + copies * trees.nbytes(trees.select(tuned, train))

    def learning_rate(self, round: int) -> float:
        """The learning rate of a round (from 1)."""
        done = min(1.0, (round - 1) / self.rounds)
        factor = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
        return self.training.learning_rate * factor[self.training.lr_scheduler_type]

    def answer(self, job: Job, client: Client) -> Any:
        """Do what a job asks, on this client's data, and return the answer described in :mod:`fedfm.core.jobs`."""
        if self.privacy:
            private.refuse(job)
        if job.blocks is None:
            return self._do(job, client)
        with shortened(self.loaded, job.blocks):
            self._short = True
            try:
                return self._do(job, client)
            finally:
                self._short = False

    @singledispatchmethod
    def _do(self, job: Job, client: Client) -> Any:
        if run := getattr(job, "run", None):
            return run(self, client)
        raise TypeError(f"no trainer answers {type(job).__name__}")

    @_do.register
    def fit(self, job: Fit, client: Client) -> Fitted:
        """Gradient steps on the batch loss: the mean over supervised positions of the whole (accumulated) batch."""
        if self.privacy and job.split == "train":
            return private.fit(self, self.privacy, self.secret, job, client)
        args = self.training
        examples = self.examples(client, job.split)
        self.space.load(job.tensors, job.patches)
        start = trees.select({n: p.detach() for n, p in self.space.parameters.items()}, job.train)
        if job.terms:
            start = trees.clone(start)
        chosen = self.space.train_only(job.train)
        rate = self.learning_rate(client.round) * job.rate
        optimizer = self.optimizer(list(chosen.values()), rate)
        held = Held(chosen, job.masks or {})
        steps = self.steps(job, client, len(examples))
        names = (client.round, client.member.id, job.purpose)
        order = batches(
            list(map(len, examples)),
            args.per_device_train_batch_size,
            seeds.generator(self.seed, *names, "batches"),
            args.group_by_length,
        )
        loss_sum, seen = torch.zeros((), dtype=torch.float64, device=self.device), 0
        draws = self._draws([names])
        self.mode(training=True)
        with torch.random.fork_rng(devices=self.cuda()):
            seeds.seed_torch(seeds.derive(self.seed, *names, "dropout"), self.device)
            for _ in range(steps):
                places = list(islice(order, args.gradient_accumulation_steps))
                group = [[examples[i] for i in chunk] for chunk in places]
                batched = [collate(chunk, self.pad) for chunk in group]
                supervised = sum(self._supervised(batch.target) for batch in batched)
                for k, (chunk, batch) in enumerate(zip(group, batched, strict=True)):
                    if job.criterion is None:
                        loss = self.losses(chunk, batch, draws=draws).total.sum() / supervised
                    else:
                        logits = self.logits(chunk, batch, draws)
                        loss = job.criterion(logits, torch.tensor(places[k])).sum() / sum(map(len, places))
                    loss_sum += loss.detach().double()  # read at the end: a GPU should not be waited for
                    for term in job.terms if k == 0 else ():
                        loss = loss + term(chosen, start)
                    loss.backward()
                    seen += len(batch.lengths)
                held.before_step()
                if args.max_grad_norm > 0:
                    torch.nn.utils.clip_grad_norm_(chosen.values(), args.max_grad_norm)
                optimizer.step()
                held.after_step()
                optimizer.zero_grad(set_to_none=True)
                self.pulse(1)
        memory = self.footprint(self.space.parameters, job.train)
        return Fitted(self.space.read(), steps, seen, float(loss_sum) / steps, rate, memory)

    @_do.register
    def gradient(self, job: Gradient, client: Client) -> Gradients:
        """The gradient over the whole split, batch after batch, without dropout."""
        examples = self.examples(client, job.split)
        self.space.load(job.tensors, job.patches)
        chosen = self.space.train_only(job.train)
        self.mode(training=False)
        chunks = [[examples[i] for i in chunk] for chunk in self.chunks(examples)]
        batched = [collate(chunk, self.pad) for chunk in chunks]
        supervised = sum(self._supervised(batch.target) for batch in batched)
        loss_sum = 0.0
        for chunk, batch in zip(chunks, batched, strict=True):
            loss = self.losses(chunk, batch).total.sum() / supervised
            loss.backward()
            loss_sum += float(loss.detach())
            self.pulse(0)
        zero = {n: torch.zeros_like(p) for n, p in chosen.items() if p.grad is None}
        found = {n: zero[n] if p.grad is None else p.grad.detach().clone() for n, p in chosen.items()}
        self.space.train_only(job.train)
        return Gradients(found, loss_sum, len(examples))

    @_do.register
    def predict(self, job: Predict, client: Client) -> torch.Tensor:
        """Class scores of every example, in the order of the split."""
        examples = self.examples(client, job.split)
        self.space.load(job.tensors, job.patches)
        self.mode(training=False)
        rows: list[torch.Tensor] = [torch.empty(0)] * len(examples)
        for chunk in self.chunks(examples):
            chosen = [examples[i] for i in chunk]
            with torch.no_grad():
                logits = self.logits(chosen, collate(chosen, self.pad)).float().cpu()
            for i, row in zip(chunk, logits, strict=True):
                rows[i] = row
            self.pulse(0)
        return torch.stack(rows)

    @_do.register
    def score(self, job: Loss, client: Client) -> Scores:
        """Losses of every example of the split, in the order of the split."""
        if job.gate is not None and not self.task.rowwise:
            raise FedfmError(
                f"ranks cannot be weighed for each example in the task {self.task.id!r}, whose model sees more than "
                "the examples. Use another task, or a method without a gate."
            )
        examples = self.encoded(client.member.id, job.split)
        total, count = torch.zeros(len(examples)), torch.zeros(len(examples), dtype=torch.long)
        tallies = []
        self.space.load(job.tensors, job.patches)
        self.mode(training=False)
        for chunk in self.chunks(examples):
            chosen = [examples[i] for i in chunk]
            mixed = nullcontext() if job.gate is None else self.space.gated(job.gate[chunk])
            with torch.no_grad(), mixed:
                losses = self.losses(chosen, collate(chosen, self.pad), held_out=job.split in ("validation", "test"))
            total[chunk] = losses.total.float().cpu()
            count[chunk] = losses.count.cpu()
            tallies.append({name: tensor.cpu() for name, tensor in losses.tally.items()})
            self.pulse(0)
        return Scores(total, count, trees.total(tallies))

    @_do.register
    def features(self, job: Features, client: Client) -> torch.Tensor:
        """What the task takes for the features of an example: of text, the mean of the last hidden state over its real
        tokens, ``[N, D]``."""
        examples = self.encoded(client.member.id, job.split)
        self.space.load(job.tensors, job.patches)
        self.mode(training=False)
        rows: list[torch.Tensor] = [torch.empty(0)] * len(examples)
        with torch.no_grad(), self.autocast():
            for chunk in self.chunks(examples):
                batch = collate([examples[i] for i in chunk], self.pad, self.device)
                pooled = self.task.features(self.model, batch).cpu()
                for i, row in zip(chunk, pooled, strict=True):
                    rows[i] = row
        return torch.stack(rows) if rows else torch.empty(0, self.loaded.model.config.get_text_config().hidden_size)

    @_do.register
    def generate(self, job: Generate, client: Client) -> list[str]:
        """Greedy continuations of the prompts, one prompt at a time so that no padding can change them."""
        tokenizer = self.loaded.tokenizer
        self.space.load(job.tensors, job.patches)
        self.mode(training=False)
        texts = []
        for prompt in job.prompts:
            inputs = tokenizer(self.task.render(prompt, self.loaded), return_tensors="pt", add_special_tokens=False).to(
                self.device
            )
            with torch.no_grad(), self.autocast():
                output = self.loaded.model.generate(
                    **inputs,
                    max_new_tokens=job.max_new_tokens,
                    do_sample=False,
                    use_cache=True,
                    pad_token_id=self.pad,
                )
            texts.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
            self.pulse(0)
        return texts

    @_do.register
    def call(self, job: Call, client: Client) -> Any:
        """The function's result on the client's rows."""
        draw = seeds.generator(self.seed, client.round, client.member.id, "call", job.function.__qualname__)
        return job.function(self.rows(client.member.id, job.split), draw)

    def examples(self, client: Client, split: str) -> list[Example]:
        """The examples of a split, at least one."""
        if examples := self.encoded(client.member.id, split):
            return examples
        what = "training" if split == "train" else split
        raise DataError(f"client {client.member.id!r} has no {what} example from which there is something to learn")
