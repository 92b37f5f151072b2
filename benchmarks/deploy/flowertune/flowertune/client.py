"""The client: loads the model, puts the adapter in, trains with TRL's trainer, sends the adapter back.

A SuperNode starts a process for each message, so imports and model are loaded each time. Which client's batches are
trained on is the node's ``partition``. An ``empty`` run sends back what came and imports nothing.
"""

from __future__ import annotations

import sys
import tempfile
import time
from typing import Any

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """The steps of this node's client in a round."""
    began, config = time.monotonic(), context.run_config
    content: Any = message.content
    if config["kind"] == "empty":
        return answer(message, content["arrays"], 1, load_s=0.0, train_s=0.0, loss=0.0)
    sys.path.insert(0, str(config["peers"]))
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from sft import train as by_trl
    from transformers import AutoTokenizer
    from work import Work

    work, number = Work.read(str(config["job"])), int(content["config"]["server-round"]) - 1
    client = work.clients(number)[int(context.node_config["partition"])]
    model, tokenizer = work.model(), AutoTokenizer.from_pretrained(work.folder / "model")
    set_peft_model_state_dict(model, content["arrays"].to_torch_state_dict())
    ready = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        loss = by_trl(work, model, tokenizer, work.batches(number, client), scratch)
    seconds = {"load_s": ready - began, "train_s": time.monotonic() - ready}
    return answer(
        message, ArrayRecord(dict(get_peft_model_state_dict(model))), work.weight(client), **seconds, loss=loss
    )


def answer(message: Message, arrays: Any, weight: float, **numbers: float) -> Message:
    """What the server gets."""
    metrics = MetricRecord({"num-examples": weight, **numbers})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
