"""Where the time of the fused trainer goes, on job a: each operation's own seconds, added up by what it is for.

    python -m benchmarks.speed.profiled      # prints a table and writes benchmarks/speed/results/profile.json

Eight clients of SmolLM2-135M take four steps each. Seconds that no operation accounts for are those of Python and of
autograd, and of the profiler itself.
"""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from benchmarks.speed.flops import limit
from fedfm import Chat, LoRA, Training, load
from fedfm.core.client import View
from fedfm.core.jobs import Fit
from fedfm.data import Chatterbot, Natural, federate
from fedfm.results import machine
from fedfm.store.files import write_json
from fedfm.train.bench import Bench
from fedfm.train.fused import Fused

RESULT = Path(__file__).parent / "results" / "profile.json"

PURPOSES = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul"),
    "attention": ("_scaled_dot_product",),
    "moving tokens": ("index_select", "index_copy", "copy_", "cat", "index", "gather", "scatter", "clone", "stack"),
    "optimizer and clipping": ("_fused_adam", "_foreach", "linalg_vector_norm"),
    "making tensors": ("empty", "zeros", "fill_", "zero_"),
}
"""What operations are for, by how their names begin after ``aten::``; the first that fits counts."""


def purpose(operation: str) -> str:
    """What an operation is for.

    >>> purpose("aten::addmm_"), purpose("aten::silu")
    ('matrix products', 'element by element')
    """
    if not operation.startswith("aten::"):
        return "Python and autograd"
    name = operation.removeprefix("aten::")
    fits = (what for what, beginnings in PURPOSES.items() if name.startswith(beginnings))
    return next(fits, "element by element")


def main(clients: int = 8) -> None:
    """Profile, print and store."""
    warnings.filterwarnings("ignore")
    loaded = load("smollm2-135m-instruct")
    people = federate(Chatterbot(), Natural("topic"), min_examples=20, max_examples=30)
    bench = Bench.of(loaded, LoRA(r=8, lora_alpha=16, target_modules=("q_proj", "v_proj")), 0)
    training = Training(max_steps=4, per_device_train_batch_size=2, learning_rate=5e-4, bf16=False)
    trainer = Fused(loaded, bench.space, Chat(max_length=128), training, people, packer=bench.packer)
    asked = [(Fit(bench.space.initial), View(people.member(c), 1)) for c in sorted(people.ids)[:clients]]
    trainer.answers(asked)  # warms up
    began = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as watch:
        trainer.answers(asked)
    whole = time.perf_counter() - began
    seconds: dict[str, float] = {}
    for event in watch.key_averages():
        what = purpose(event.key)
        seconds[what] = seconds.get(what, 0.0) + event.self_cpu_time_total / 1e6
    accounted = sum(s for what, s in seconds.items() if what != "Python and autograd")
    seconds["Python and autograd"] = max(0.0, whole - accounted)
    parts = [{"name": n, "seconds": s, "share": s / whole} for n, s in sorted(seconds.items(), key=lambda i: -i[1])]
    shown = Table("part", "seconds", "share")
    for part in parts:
        shown.add_row(str(part["name"]), f"{part['seconds']:.2f}", f"{part['share']:.1%}")
    Console().print(shown)
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as counted:  # by itself, as it takes time
        trainer.answers(asked)
    flop, rate = sum(event.flops or 0 for event in counted.key_averages()), limit("cpu", 1024, dtype=torch.float32)
    # What no way of arranging the same products can beat.
    floor = {"flop": flop, "flop_per_s": rate, "least_s": flop / rate}
    Console().print(floor)
    about = {"machine": machine(), "torch": torch.__version__, **floor}
    what = (
        f"{clients} clients of SmolLM2-135M fused on job a, four steps each, float32; {whole:.1f} s under the profiler"
    )
    write_json(RESULT, json.loads(json.dumps({**about, "what": what, "parts": parts})))


if __name__ == "__main__":
    main()
