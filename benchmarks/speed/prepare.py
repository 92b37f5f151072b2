"""A job for all peers of the speed benchmark: the model, the adapter's first values, and the batch of every step.

    python -m benchmarks.speed.prepare a [--out DIR]                   # LoRA on a chat model, 8 clients
    python -m benchmarks.speed.prepare b --clients 64 [--out DIR]      # LoRA and a head on a text classifier
    python -m benchmarks.speed.prepare c --clients 100 --megabytes 10  # client work that trains nothing

The batches are those that fedfm's trainer draws for the seed, written as tokens, so that peers need no fedfm to do the
very same steps. ``job.json`` holds

- ``kind`` (chat, classify or empty), ``lora``, ``training``, ``task``, ``pad_token_id``, ``seed`` and, in words,
  ``about``;
- ``clients``: of each its ``examples`` (its weight in the mean), the ``rows`` of its texts and, where it takes part,
  its ``encoded`` examples: ``input_ids`` with ``labels``, -100 where nothing is supervised, or a class;
- ``rounds``: for each round and each of its clients the examples of every step, as places in ``encoded``; of an empty
  job only the clients.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.fidelity.scenarios import DATA, topics
from fedfm import Chat, Classify, Federation, FedIT, LoRA, Training, Uniform, federate, from_rows, load
from fedfm.core import seeds
from fedfm.data import Chatterbot, Natural, Splits
from fedfm.models import Loaded
from fedfm.store.files import write_json
from fedfm.tasks.task import Example, Task
from fedfm.train.batches import batches

HOME = Path.home() / ".cache" / "fedfm-benchmarks"
SEED = 0
Rows = Mapping[str, Sequence[Mapping[str, Any]]]


def chat(folder: Path, rounds: int, clients: int) -> dict[str, Any]:
    """Job a: SmolLM2-135M tuned over dialogues, one topic a client."""
    people = federate(Chatterbot(), Natural("topic"), min_examples=20, max_examples=30, seed=SEED)
    ids = sorted(people.ids)[:clients]
    rows = {id: [{"messages": row["messages"]} for row in people.rows(id, "train")] for id in ids}
    return job(
        folder,
        "chat",
        load("smollm2-135m-instruct"),
        rows,
        Chat(max_length=128),
        {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
        {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 5e-4},
        rounds,
        len(ids),
        "LoRA r=8 on q_proj and v_proj of SmolLM2-135M-Instruct, dialogues of chatterbot-corpus, one topic a client",
    )


def classify(folder: Path, rounds: int, clients: int) -> dict[str, Any]:
    """Job b: MiniLM with a new head on news in four classes, a tenth of the clients in each round."""
    texts, about = news()
    # There are fewer texts than a thousand clients train on, so later clients share theirs with earlier ones.
    rows = {f"client-{i:04}": [texts[(32 * i + j) % len(texts)] for j in range(32)] for i in range(clients)}
    loaded = load("all-minilm-l6-v2", head="sequence_classification", num_labels=1 + max(r["label"] for r in texts))
    # Dropout is off: its draws differ from peer to peer, and then the losses could not be compared.
    loaded.model.config.hidden_dropout_prob = loaded.model.config.attention_probs_dropout_prob = 0.0
    return job(
        folder,
        "classify",
        loaded,
        rows,
        Classify(max_length=64),
        {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"], "modules_to_save": ["classifier"]},
        {"max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 5e-4},
        rounds,
        clients if clients <= 8 else max(1, round(clients / 10)),
        f"LoRA r=8 on query and value of all-MiniLM-L6-v2 and a head, without dropout, {about}, dealt by chance",
    )


def empty(folder: Path, rounds: int, clients: int, megabytes: float) -> dict[str, Any]:
    """Job c: every client receives tensors, adds 1 to all numbers and sends them back.

    The model is there only because a federation of fedfm has one.
    """
    small_llama(folder / "model")
    number = max(1, round(megabytes))
    size = max(1, round(megabytes * 1e6 / 4 / number))
    tensors = {f"layer{i:02}.weight": torch.zeros(size) for i in range(number)}
    save_file(tensors, folder / "initial.safetensors")
    ids = [f"client-{i:04}" for i in range(clients)]
    return {
        "kind": "empty",
        "about": f"client work that trains nothing, with an update of {4 * size * number / 1e6:g} MB in float32",
        "seed": SEED,
        "lora": {"r": 1},
        "training": {},
        "task": {},
        "clients": {id: {"examples": 1, "rows": [{"text": f"a row of {id}"}]} for id in ids},
        "rounds": [ids] * rounds,
    }


def job(
    folder: Path,
    kind: str,
    loaded: Loaded,
    rows: Rows,
    task: Task,
    lora: Mapping[str, Any],
    training: Mapping[str, Any],
    rounds: int,
    sampled: int,
    about: str,
) -> dict[str, Any]:
    """Write the model and the adapter's first values; the content of ``job.json``.

    Args:
        folder: where to write.
        kind: ``chat`` or ``classify``.
        loaded: the model; a space is put into it.
        rows: of each client, all of them to train on.
        task: what is learnt.
        lora: settings of the adapter, in peft's words.
        training: training arguments in the spellings of Hugging Face.
        rounds: rounds of the run.
        sampled: clients of a round.
        about: the job in words.
    """
    loaded.model.save_pretrained(folder / "model")
    loaded.tokenizer.save_pretrained(folder / "model")
    training = {**training, "max_grad_norm": 1.0, "weight_decay": 0.0}
    space = {name: tuple(v) if isinstance(v, list) else v for name, v in lora.items()}
    federation = Federation(
        # Read again, as fedfm's peer does: the head is then no new one.
        load(str(folder / "model"), head=task.head),
        FedIT(),
        from_rows(rows, Splits(validation=0, test=0, group_by=""), SEED),
        task,
        space=LoRA(**space),
        training=Training(**training),
        rounds=rounds,
        sampler=Uniform(count=sampled),
        seed=SEED,
    )
    save_file({n: t.contiguous() for n, t in federation.layout.initial.items()}, folder / "initial.safetensors")
    plan, encoded = schedule(federation)
    return {
        "kind": kind,
        "about": about,
        "seed": SEED,
        "lora": dict(lora),
        "training": training,
        "task": {"max_length": task.max_length},  # type: ignore[attr-defined]
        "pad_token_id": loaded.tokenizer.pad_token_id,
        "clients": {
            id: {
                "examples": federation.plan.members.member(id).examples,
                "rows": list(rows[id]),
                "encoded": encoded.get(id, []),
            }
            for id in federation.ids
        },
        "rounds": plan,
    }


def schedule(federation: Federation) -> tuple[list[dict[str, list[list[int]]]], dict[str, list[dict[str, Any]]]]:
    """What a federation of one ``Fit`` per client and round will do.

    Returns:
        For each round and client the examples of each step as places among the client's examples; and these examples
        of all clients that take part.
    """
    trainer, plan = federation.trainer, federation.plan
    rounds: list[dict[str, list[list[int]]]] = []
    encoded: dict[str, list[dict[str, Any]]] = {}
    for number in range(1, plan.rounds + 1):
        rounds.append({})
        for client in plan.sampler.sample(federation.ids, number, federation.seed):
            examples = trainer.encoded(client, "train")
            encoded.setdefault(client, [plain(example) for example in examples])
            draw = seeds.generator(federation.seed, number, client, "fit", "batches")
            order = batches([len(e) for e in examples], plan.training.per_device_train_batch_size, draw, False)
            rounds[-1][client] = list(islice(order, plan.training.steps(len(examples))))
    return rounds, encoded


def plain(example: Example) -> dict[str, Any]:
    """An example as ``job.json`` has it."""
    return {"input_ids": example.input_ids.tolist(), "labels": example.target.tolist()}


def news() -> tuple[list[dict[str, Any]], str]:
    """Texts in classes, and what they are: AG News, or questions by topic where that is absent."""
    if not (place := DATA / "ag_news.csv").exists():
        stand_in = topics()
        return stand_in.rows, stand_in.about
    with place.open(newline="", encoding="utf-8") as file:
        rows = [{"text": f"{title}. {text}", "label": int(number) - 1} for number, title, text in csv.reader(file)]
    return rows, "AG News (title and text, 4 classes)"


def small_llama(folder: Path) -> None:
    """Write a model of one block with a tokenizer of bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<pad>", "<end>", *alphabet])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<end>")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def prepare(name: str, folder: Path, *, clients: int, rounds: int = 3, megabytes: float = 10) -> dict[str, Any]:
    """Write a job.

    Args:
        name: ``a``, ``b`` or ``c``.
        folder: where.
        clients: clients of the federation.
        rounds: rounds of the run.
        megabytes: size of the update of job c.

    Returns:
        What is to be known of it beside a result: all but rows, examples and batches.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if name == "c":
        made = empty(folder, rounds, clients, megabytes)
    else:
        made = {"a": chat, "b": classify}[name](folder, rounds, clients)
    (folder / "job.json").write_text(json.dumps(made) + "\n")
    said = {k: made[k] for k in ("kind", "about", "seed", "lora", "training", "task")}
    if name == "c":
        said["megabytes"] = megabytes
    return {"job": name, **said, "clients": clients, "a_round": len(made["rounds"][0]), "rounds": rounds}


def main(words: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.prepare")
    parser.add_argument("job", choices=("a", "b", "c"))
    parser.add_argument("--out", type=Path, help=f"folder to write; by default one under {HOME}")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=float, default=10.0, help="size of the update of job c")
    asked = parser.parse_args(words)
    out = asked.out or HOME / "jobs" / asked.job
    about = prepare(asked.job, out, clients=asked.clients, rounds=asked.rounds, megabytes=asked.megabytes)
    write_json(out / "about.json", about)
    print(out)


if __name__ == "__main__":
    main()
