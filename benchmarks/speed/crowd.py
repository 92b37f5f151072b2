"""One reading of what many clients cost: run by :mod:`benchmarks.speed.scale` in processes of their own."""

from __future__ import annotations

import ctypes
import gc
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset, load_from_disk
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.fidelity.trial import forget_peak, peak
from fedfm import CausalLM, Federation, FedIT, LoRA, Training, Uniform, federate, load
from fedfm.core.method import Client, Work
from fedfm.core.update import Tensors, Update
from fedfm.data import Iid, Natural, Splits
from fedfm.data.columns import quiet
from fedfm.evaluate import Evaluation
from fedfm.methods.lora.fedsa_lora import FedSALoRA
from fedfm.models import Loaded
from fedfm.store.clients import ClientStore
from fedfm.train import Trainer
from fedfm.train.fused import Fused

ROWS = 3
"""Rows of a client."""
NEVER = Evaluation(every=0)
STEP = Training(max_steps=1, per_device_train_batch_size=4, learning_rate=1e-3)
ENGINES: dict[str, type[Trainer]] = {"one by one": Trainer, "fused": Fused}
METHODS = {"fedit": FedIT, "fedsa-lora": FedSALoRA}
Found = dict[str, Any]


@dataclass(frozen=True)
class Fresh(FedIT):
    """Client work that trains nothing and sends tensors of its own, as large as those received."""

    def local(self, client: Client, message: Tensors) -> Work:
        yield from ()
        return Update({name: torch.full_like(t, 1e-3) for name, t in message.items()})


def drawn(**shape: int) -> Loaded:
    """A Llama with random weights and a tokenizer of bytes.

    Args:
        shape: settings of ``LlamaConfig``; one block of width 16 where they say nothing.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<pad>", "<end>", *alphabet])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<end>")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
        torch.default_generator.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**{"vocab_size": len(tokenizer), **small, **shape})).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return load(folder)


def memory_mb() -> dict[str, float]:
    """Resident memory of this process now, in MB: ``rss``, and ``used`` after the allocator gave back what is free.

    Peaks are counted from now on. Pages that other processes share are counted in full, so that these do not matter.
    """
    gc.collect()
    rss = resident_mb()
    # Else what comes next could use what something earlier has left, and would seem to take nothing.
    ctypes.CDLL(None).malloc_trim(0)
    forget_peak()
    return {"rss": rss, "used": resident_mb()}


def resident_mb() -> float:
    """Resident memory of this process, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def beyond(before: Mapping[str, float], when: str) -> Found:
    """Memory more than was used before, as ``{when}_{kind}_mb``."""
    return {f"{when}_{kind}_mb": value - before["used"] for kind, value in memory_mb().items()}


def rows_of(clients: int, folder: Path) -> Path:
    """A table on disk with ``ROWS`` rows of each client; those of a client lie far apart."""
    place = folder / f"rows-{clients}"
    if not place.exists():
        numbers = range(ROWS * clients)
        texts = pa.array(f"row number {i} of all" for i in numbers)
        owners = pa.array(f"phone-{i % clients:07d}" for i in numbers)
        with quiet():
            Dataset(pa.table({"text": texts, "owner": owners})).save_to_disk(place)
    return place


def registered(clients: int, partition: str, visited: int, rows: str) -> Found:
    """Start-up and memory with so many clients, before and after a round with some of them."""
    loaded, dataset = drawn(), load_from_disk(rows)
    before, began = memory_mb(), time.perf_counter()
    people = federate(dataset, Iid(clients) if partition == "iid" else Natural("owner"))
    federation = Federation(
        loaded, FedIT(), people, CausalLM(), training=STEP, rounds=1, sampler=Uniform(count=visited), evaluation=NEVER
    )
    _, _ = federation.trainer, federation.start()
    found = {"startup_s": time.perf_counter() - began, **beyond(before, "built")}
    with tempfile.TemporaryDirectory() as folder:
        [_, record] = federation.run(Path(folder) / "run").records
    assert len(record["participants"]) == min(visited, clients)
    return {**found, "round_s": record["seconds"], **beyond(before, "visited")}


def sampled(clients: int, population: int, rows: str) -> Found:
    """Seconds and peak memory of a round with so many sampled clients."""
    loaded, people = drawn(), federate(load_from_disk(rows), Iid(population))
    federation = Federation(
        loaded, FedIT(), people, CausalLM(), training=STEP, rounds=1, sampler=Uniform(count=clients), evaluation=NEVER
    )
    _ = federation.trainer
    before = memory_mb()["used"]
    [_, record] = federation.run().records
    assert len(record["participants"]) == clients
    return {
        "seconds": record["seconds"],
        "ms_a_client": 1000 * record["seconds"] / clients,
        "peak_mb": peak() - before,
        "after_mb": memory_mb()["used"] - before,
    }


def cohort(clients: int, engine: str, width: int, blocks: int) -> Found:
    """Peak memory of a round in which so many clients send an update each.

    Args:
        clients: of the round.
        engine: ``one by one``, or ``fused``, where a group of clients has finished before the first update is read.
        width: of the model, and rank of the adapter: an update has ``4 * blocks * width ** 2`` numbers of 4 bytes.
        blocks: of the model.
    """
    loaded = drawn(hidden_size=width, num_hidden_layers=blocks)
    people = federate(Dataset.from_dict({"text": [f"row {i}" for i in range(clients)]}), Iid(clients), Splits(0, 0))
    federation = Federation(
        loaded,
        Fresh(),
        people,
        CausalLM(),
        space=LoRA(r=width, target_modules=("q_proj", "v_proj")),
        rounds=1,
        evaluation=NEVER,
        engine=ENGINES[engine],
    )
    _, state = federation.trainer, federation.start()
    size = sum(t.nbytes for t in state.weights.values()) / 1e6
    # Asked once before, so that what a first question sets up is not counted.
    link = federation.connect(ClientStore())
    for _ in link.ask("local", 1, dict.fromkeys(map(people.member, federation.ids[:8]), state.weights)):
        pass
    before = memory_mb()["used"]
    [_, record] = federation.run().records
    assert len(record["participants"]) == clients
    return {"update_mb": size, "seconds": record["seconds"], "peak_mb": peak() - before}


def private(clients: int, method: str, width: int) -> Found:
    """Memory and files after a round in which so many clients trained."""
    loaded = drawn(hidden_size=width, intermediate_size=width)
    people = federate(Dataset.from_dict({"text": [f"row {i}" for i in range(clients)]}), Iid(clients), Splits(0, 0))
    federation = Federation(
        loaded, METHODS[method](), people, CausalLM(), space=LoRA(r=width), training=STEP, rounds=1, evaluation=NEVER
    )
    _ = federation.trainer
    before = memory_mb()
    with tempfile.TemporaryDirectory() as folder:
        outcome = federation.run(Path(folder) / "run")
        files = list((Path(folder) / "run" / "clients").glob("*/*.safetensors"))
        kept = sum(file.stat().st_size for file in files) / 1e6
    seconds = outcome.records[1]["seconds"]
    return {"files": len(files), "kept_mb": kept, "seconds": seconds, **beyond(before, "visited")}


PARTS: dict[str, Callable[..., Found]] = {
    "registered": registered,
    "round": sampled,
    "cohort": cohort,
    "private": private,
}
