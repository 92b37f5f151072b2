"""TRL: an ``SFTTrainer`` for each client and round in one process, the way OpenFedLLM works.

    python benchmarks/speed/peers/trl_peer.py JOB OUT.json

The model is loaded once; the adapter goes in and out by peft's own functions. See :mod:`sft` for the settings.

The clock starts before the first round, with model and adapter in memory, and stops when the last mean is made.
"""

from __future__ import annotations

import tempfile
import time

from peft import get_peft_model_state_dict, set_peft_model_state_dict
from sft import train
from transformers import AutoTokenizer
from work import BEGAN, Work, arguments, mean


def main() -> None:
    """Run and write."""
    asked = arguments(["default"])
    work = Work.read(asked.job)
    if work.kind != "chat":
        raise SystemExit("SFTTrainer trains language models, not this job")
    model, values, losses = work.model(), work.initial(), []
    tokenizer = AutoTokenizer.from_pretrained(work.folder / "model")
    with tempfile.TemporaryDirectory() as scratch:
        began = time.time()
        for number in range(work.rounds):
            clients = work.clients(number)
            updates, found = [], []
            for client in clients:
                set_peft_model_state_dict(model, values)
                found.append(train(work, model, tokenizer, work.batches(number, client), scratch))
                updates.append({n: t.detach().clone() for n, t in get_peft_model_state_dict(model).items()})
            values = mean(updates, [work.weight(client) for client in clients])
            losses.append(sum(found) / len(found))
        done = time.time()
    work.report(asked.out, "trl", asked.mode, startup_s=began - BEGAN, train_s=done - began, losses=losses)


if __name__ == "__main__":
    main()
