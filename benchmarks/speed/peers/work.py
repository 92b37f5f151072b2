"""The work of a job as peers read it: no word of fedfm, so that each peer runs in an environment of its own.

A job folder holds ``job.json``, for text jobs the model as a Hugging Face folder ``model`` and the adapter's first
values ``initial.safetensors``. All peers do the same steps on the same batches from the same values and give the same
losses; :mod:`benchmarks.speed.compare` checks that.

Letters in shapes: B examples of a batch, T tokens of the longest of them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

BEGAN = float(os.environ.get("PEER_BEGAN", time.time()))
"""When the process was started, in seconds since 1970; told by whoever starts it, else the import of this module."""

IGNORE = -100
"""Label of a position that is not supervised."""

PACKAGES = ("torch", "transformers", "peft", "trl", "flwr", "ray", "pfl", "nvflare", "fedfm", "numpy", "accelerate")

Example = dict[str, Any]
"""``input_ids`` and ``labels``: a list of tokens each, or a class number as ``labels``."""

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Work:
    """A job.

    Args:
        folder: where it lies.
        about: the content of ``job.json``.
    """

    folder: Path
    about: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path | str) -> Work:
        """The job in a folder."""
        place = Path(folder).resolve()
        return cls(place, json.loads((place / "job.json").read_text()))

    @property
    def kind(self) -> str:
        """``chat``, ``classify`` or ``empty``."""
        return self.about["kind"]

    @property
    def training(self) -> Mapping[str, Any]:
        """Training arguments in the spellings of Hugging Face."""
        return self.about["training"]

    @property
    def rounds(self) -> int:
        """Rounds of the run."""
        return len(self.about["rounds"])

    def clients(self, number: int) -> list[str]:
        """Who takes part in a round (from 0), in the order of ids."""
        return list(self.about["rounds"][number])

    def batches(self, number: int, client: str) -> list[list[Example]]:
        """The examples of each step of a client in a round (from 0)."""
        encoded = self.about["clients"][client]["encoded"]
        return [[encoded[i] for i in batch] for batch in self.about["rounds"][number][client]]

    def weight(self, client: str) -> float:
        """The client's weight in the mean: its number of examples."""
        return float(self.about["clients"][client]["examples"])

    @cached_property
    def steps(self) -> int:
        """Optimizer steps of the whole run; of an empty job, client tasks."""
        if self.kind == "empty":
            return sum(len(clients) for clients in self.about["rounds"])
        return sum(len(batches) for clients in self.about["rounds"] for batches in clients.values())

    @cached_property
    def tokens(self) -> int:
        """Tokens that the steps see, without padding."""
        if self.kind == "empty":
            return 0
        return sum(
            len(example["input_ids"])
            for number in range(self.rounds)
            for client in self.clients(number)
            for batch in self.batches(number, client)
            for example in batch
        )

    def initial(self) -> Tensors:
        """What is tuned or, of an empty job, sent, before the first round; names are those of a PEFT adapter file."""
        from safetensors.torch import load_file

        return load_file(self.folder / "initial.safetensors")

    def collate(self, examples: Sequence[Example]) -> Tensors:
        """A batch padded to the longest of its examples: ``input_ids``, ``attention_mask`` and ``labels``, each
        ``[B, T]``; of classes ``labels`` is ``[B]``."""
        width = max(len(e["input_ids"]) for e in examples)

        def padded(rows: Iterable[list[int]], filler: int) -> torch.Tensor:
            return torch.tensor([row + [filler] * (width - len(row)) for row in rows])

        classes = self.kind == "classify"
        return {
            "input_ids": padded((e["input_ids"] for e in examples), self.about["pad_token_id"]),
            "attention_mask": padded(([1] * len(e["input_ids"]) for e in examples), 0),
            "labels": torch.tensor([e["labels"] for e in examples])
            if classes
            else padded((e["labels"] for e in examples), IGNORE),
        }

    def base(self) -> Any:
        """The model without an adapter, in float32."""
        import transformers

        kinds = {"chat": "AutoModelForCausalLM", "classify": "AutoModelForSequenceClassification"}
        return getattr(transformers, kinds[self.kind]).from_pretrained(self.folder / "model", dtype=torch.float32)

    def lora(self) -> Any:
        """The settings of the adapter, for peft."""
        from peft import LoraConfig

        kinds = {"chat": "CAUSAL_LM", "classify": "SEQ_CLS"}
        return LoraConfig(**self.about["lora"], task_type=kinds[self.kind])

    def model(self) -> Any:
        """The peft model with the adapter's first values."""
        from peft import get_peft_model

        model = get_peft_model(self.base(), self.lora())
        put(tuned(model), self.initial())
        return model

    def report(
        self,
        place: Path | str,
        peer: str,
        mode: str,
        *,
        startup_s: float,
        train_s: float,
        losses: Sequence[float],
        threads: Mapping[str, int] | None = None,
        **more: Any,
    ) -> None:
        """Write what a run gave.

        Args:
            place: the file.
            peer: who ran.
            mode: how.
            startup_s: seconds from the start of the process to the first round.
            train_s: seconds of all rounds.
            losses: for each round, the mean over its clients of the mean loss over their steps, in nats; of an empty
                job, one number: the mean of all numbers that the server has at the end.
            threads: processes that train at a time and threads of each; by default this one and torch's.
            more: further remarks.
        """
        result = {
            "peer": peer,
            "mode": mode,
            "versions": versions(),
            "startup_s": startup_s,
            "train_s": train_s,
            "steps": self.steps,
            "tokens": self.tokens,
            "losses": list(losses),
            "threads": dict(threads or {"processes": 1, "torch": torch.get_num_threads()}),
            **more,
        }
        Path(place).write_text(json.dumps(result, indent=1) + "\n")


def versions() -> dict[str, str]:
    """Versions of the packages of this environment that matter."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def tuned(model: Any) -> dict[str, torch.nn.Parameter]:
    """The trainable parameters of a peft model, by the names of its adapter file."""
    found = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return {re.sub(r"\.(modules_to_save\.default|default)(?=\.|$)", "", name): p for name, p in found.items()}


@torch.no_grad()
def put(parameters: Mapping[str, torch.nn.Parameter], values: Mapping[str, torch.Tensor]) -> None:
    """Set parameters to values of the same names."""
    if parameters.keys() != values.keys():
        raise ValueError(f"other tensors than those of the job: {sorted(parameters.keys() ^ values.keys())[:4]}")
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def mean(updates: Sequence[Mapping[str, torch.Tensor]], weights: Sequence[float]) -> Tensors:
    """The weighted mean of tensors, name by name."""
    whole = sum(weights)
    return {
        name: sum((w / whole * update[name] for w, update in zip(weights, updates, strict=True)), torch.tensor(0.0))
        for name in updates[0]
    }


def average(tensors: Mapping[str, torch.Tensor]) -> float:
    """The mean of all numbers."""
    return float(torch.stack([t.double().mean() for t in tensors.values()]).mean())


def arguments(modes: Sequence[str]) -> argparse.Namespace:
    """The command line of a peer: ``job``, ``out`` and ``mode``, by default the first."""
    parser = argparse.ArgumentParser()
    parser.add_argument("job", help="folder that benchmarks.speed.prepare wrote")
    parser.add_argument("out", help="JSON file to write")
    parser.add_argument("--mode", choices=modes, default=modes[0])
    return parser.parse_args()
