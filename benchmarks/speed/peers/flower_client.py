"""What a client does in :mod:`flower`; a module of its own, so that Ray's workers import it and keep what it holds."""

from __future__ import annotations

import os
import tempfile
from functools import cache
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from work import Work

KEEP = "PEER_KEEPS_MODEL"
"""Environment variable: whether a worker keeps the model from task to task."""

app = ClientApp()


@cache
def work(folder: str) -> Work:
    """The job, read once by each worker."""
    return Work.read(folder)


@cache
def kept(folder: str) -> tuple[Any, Any]:
    """Model and tokenizer, loaded once by each worker."""
    return loaded(folder)


def loaded(folder: str) -> tuple[Any, Any]:
    """The peft model and its tokenizer."""
    from transformers import AutoTokenizer

    return work(folder).model(), AutoTokenizer.from_pretrained(work(folder).folder / "model")


@app.query()
def query(message: Message, context: Context) -> Message:
    """Be there: import all that training needs, and load the model where it is kept."""
    folder = str(message.content["config"]["job"])
    if work(folder).kind == "chat":
        import sft  # noqa: F401
    if work(folder).kind != "empty" and os.environ.get(KEEP):
        kept(folder)
    # A hint to the operator: how many threads a worker computes with.
    return Message(RecordDict({"metrics": MetricRecord({"threads": torch.get_num_threads()})}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """The steps of one client in one round; the adapter goes in and out by peft's own functions."""
    config = message.content["config"]
    folder, client = str(config["job"]), str(config["client"])
    number, job = int(config["server-round"]) - 1, work(str(config["job"]))
    arrays = message.content["arrays"].to_torch_state_dict()
    if job.kind == "empty":
        result, loss = {name: t + 1 for name, t in arrays.items()}, 0.0
    else:
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        model, tokenizer = kept(folder) if os.environ.get(KEEP) else loaded(folder)
        set_peft_model_state_dict(model, arrays)
        if job.kind == "chat":
            from sft import train as by_trl

            with tempfile.TemporaryDirectory() as scratch:
                loss = by_trl(job, model, tokenizer, job.batches(number, client), scratch)
        else:
            from plain import train as by_loop

            loss = by_loop(job, model.train(), number, client, bf16=False)
        result = dict(get_peft_model_state_dict(model))
    metrics = {"loss": loss, "num-examples": job.weight(client)}
    content = RecordDict({"arrays": ArrayRecord(result), "metrics": MetricRecord(metrics)})
    return Message(content, reply_to=message)
