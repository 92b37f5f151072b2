"""The in-process engine beside a plain PyTorch loop, in one run, as ratios.

    python -m benchmarks.speed.overhead            # prints a table and writes benchmarks/speed/results/overhead.json

What is measured:
- overhead: seconds of a client task over those of a plain loop that does the same steps on the same batches with the
  same loss, alternating; the median of the pairs is what counts.
- start-up: from loaded model and data to a federation that can run its first task.
- empty task: a client whose work trains nothing, on a model of two tensors' worth of work.
- soak: resident memory over 200 tasks that train.
- scale: resident memory and seconds with 100,000 registered clients of which 1 percent is visited.
"""

from __future__ import annotations

import gc
import json
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedfm import CausalLM, Chat, Federation, FedIT, LoRA, Training, Uniform, federate, load
from fedfm.core import seeds
from fedfm.core.client import View
from fedfm.core.method import Client, Work
from fedfm.core.update import Tensors, Update
from fedfm.data import Chatterbot, Iid, Natural
from fedfm.evaluate import Evaluation
from fedfm.observe import Observer
from fedfm.results import machine
from fedfm.store.clients import ClientStore
from fedfm.tasks.task import collate
from fedfm.train.batches import batches

HERE = Path(__file__).parent
NEVER = Evaluation(every=0)
ARGS = Training(max_steps=4, per_device_train_batch_size=2, learning_rate=1e-3, cache_frozen_blocks=False)


@dataclass(frozen=True)
class Idle(FedIT):
    """Client work that asks for nothing."""

    def local(self, client: Client, message: Tensors) -> Work:
        yield from ()
        return Update(message)


class Watch(Observer):
    """Reads the memory after every round."""

    def __init__(self) -> None:
        self.readings: list[float] = []

    def round_finished(self, record: Mapping[str, Any]) -> None:
        self.readings.append(memory_mb())


def memory_mb() -> float:
    """Resident memory of this process now, in MB."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def plain_loop(federation: Federation, view: View) -> None:
    """What a user would write for one client: its batches, the loss, AdamW."""
    trainer, space = federation.trainer, federation.bench.space
    examples = trainer.encoded(view.member.id, "train")
    draw = seeds.generator(0, view.round, view.member.id, "fit", "batches")
    order = batches([len(e) for e in examples], ARGS.per_device_train_batch_size, draw, by_length=False)
    parameters = [p for p in space.parameters.values() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=ARGS.learning_rate, weight_decay=0.0, fused=True)
    federation.bench.loaded.model.train()
    for chosen in islice(order, ARGS.max_steps):
        batch = collate([examples[i] for i in chosen], trainer.pad)
        losses = trainer.task.losses(trainer.model, batch)
        (losses.total.sum() / losses.count.sum()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, ARGS.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()


def tiny_model(folder: str) -> str:
    """A model so small that what is measured is the engine."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<pad>", "<end>", *alphabet])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<end>")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def overhead(pairs: int = 7) -> Iterator[tuple[str, float | str]]:
    """Client tasks of a real model against the plain loop; also start-up and soak on that model."""
    loaded = load("smollm2-135m-instruct")
    people = federate(Chatterbot(), Natural("topic"), min_examples=20, max_examples=48)
    began = time.perf_counter()
    federation = Federation(
        loaded, FedIT(), people, Chat(max_length=128), space=LoRA(r=8), training=ARGS, evaluation=NEVER
    )
    link = federation._link(ClientStore(), federation.trainer)
    state = federation.start()
    yield "start-up, s (goal 0.2)", time.perf_counter() - began

    ids = [i for i in federation.ids if i != "coding"][:pairs]
    ratios, plain_s, task_s = [], [], []
    for number, client in enumerate([ids[0], *ids]):  # the first pair warms up
        member = people.member(client)
        message = {member: federation.method.message(state, member)}
        federation.trainer.encoded(client, "train")

        def task(message: dict = message) -> float:
            at = time.perf_counter()
            list(link.ask("local", 1, message))
            return time.perf_counter() - at

        def plain(member=member) -> float:  # type: ignore[no-untyped-def]
            federation.bench.space.load({})
            federation.bench.space.train_only(("*",))
            at = time.perf_counter()
            plain_loop(federation, View(member, 1))
            return time.perf_counter() - at

        first, second = (task, plain) if number % 2 else (plain, task)
        seconds = {first: first(), second: second()}
        if number:
            ratios.append(seconds[task] / seconds[plain])
            task_s.append(seconds[task] / ARGS.max_steps)
            plain_s.append(seconds[plain] / ARGS.max_steps)
    yield "client task / plain loop (goal 1.03)", statistics.median(ratios)
    yield "  spread of the pairs", f"{min(ratios):.3f} to {max(ratios):.3f}"
    yield "plain loop, s a step", statistics.median(plain_s)
    yield "client task, s a step", statistics.median(task_s)


def soak(tasks: int = 200) -> Iterator[tuple[str, float | str]]:
    """Memory over many training tasks of a small model; a leak of one update a task would show."""
    with tempfile.TemporaryDirectory() as folder:
        rows = datasets.Dataset.from_dict({"text": [f"row {i} of the soak" for i in range(400)]})
        people = federate(rows, Iid(50))
        args = Training(max_steps=1, per_device_train_batch_size=2)
        federation = Federation(
            tiny_model(folder), FedIT(), people, CausalLM(), training=args, rounds=tasks // 50 + 1, evaluation=NEVER
        )
        watch = Watch()
        federation.run(observers=[watch])
    first, last = watch.readings[1], watch.readings[-1]
    yield "memory after the first 50 tasks, MB", first
    yield f"its growth over the next {tasks} tasks, MB", last - first


def empty_tasks(tasks: int = 3000) -> Iterator[tuple[str, float | str]]:
    """Milliseconds of a client task in which nothing is trained."""
    with tempfile.TemporaryDirectory() as folder:
        rows = datasets.Dataset.from_dict({"text": [f"row {i}" for i in range(tasks)]})
        people = federate(rows, Iid(tasks))
        federation = Federation(tiny_model(folder), Idle(), people, CausalLM(), rounds=1, evaluation=NEVER)
        _ = federation.trainer
        for client in federation.ids:
            people.member(client)  # the split of a client is drawn at its first visit, whoever visits it
        began = time.perf_counter()
        federation.run()
        yield "empty task, ms a client (goal 0.3)", 1000 * (time.perf_counter() - began) / tasks


def scale(clients: int = 100_000) -> Iterator[tuple[str, float | str]]:
    """Memory beyond the model with many registered clients and few visited."""
    with tempfile.TemporaryDirectory() as folder:
        model = load(tiny_model(folder))
        rows = datasets.Dataset.from_dict({"text": [f"row number {i} of all" for i in range(5 * clients)]})
        before, began = memory_mb(), time.perf_counter()
        people = federate(rows, Iid(clients))
        federation = Federation(
            model,
            FedIT(),
            people,
            CausalLM(),
            training=Training(max_steps=1, per_device_train_batch_size=4),
            rounds=1,
            sampler=Uniform(fraction=0.01),
        )
        _ = federation.trainer
        yield f"{clients} clients: seconds to build", time.perf_counter() - began
        outcome = federation.run(Path(folder) / "run")
        visited = len(outcome.records[1]["participants"])
        yield f"{clients} clients, {visited} visited: memory beyond the model, MB (goal 1000)", memory_mb() - before


def main() -> None:
    """Run all, print and store."""
    warnings.filterwarnings("ignore")
    results: dict[str, float | str] = {}
    for part in (empty_tasks, soak, scale, overhead):
        for name, value in part():
            results[name] = value
            print(f"{name:<72} {value if isinstance(value, str) else f'{value:.3f}'}", flush=True)
    about = {"machine": machine(), "torch": torch.__version__, "python": platform.python_version()}
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "overhead.json").write_text(json.dumps({**about, "results": results}, indent=1) + "\n")
    print(about)


if __name__ == "__main__":
    main()
