"""A plain PyTorch loop over a peft model: the limit for one client at a time.

    python benchmarks/speed/peers/plain.py JOB OUT.json [--mode fp32|bf16]

The model is loaded once; of each client only the adapter is put in and read out. Batches are padded to their longest
example, the model gives all logits and Hugging Face's own loss. ``bf16`` computes in bfloat16 by autocast.

The clock starts before the first round, with model and adapter in memory, and stops when the last mean is made.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from work import BEGAN, Tensors, Work, arguments, average, mean, put, tuned


def train(work: Work, model: Any, number: int, client: str, bf16: bool) -> float:
    """The steps of one client in one round with a fresh optimizer; the mean loss over the steps."""
    args = work.training
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args["learning_rate"], weight_decay=args["weight_decay"], fused=True)
    batches = work.batches(number, client)
    total = 0.0
    for examples in batches:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = model(**work.collate(examples)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, args["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad()
        total += float(loss.detach())
    return total / len(batches)


def text(work: Work, bf16: bool) -> tuple[float, float, list[float]]:
    """Begin of the first and end of the last round, and the loss of each."""
    model, values, losses = work.model().train(), work.initial(), []
    parameters = tuned(model)
    began = time.time()
    for number in range(work.rounds):
        clients = work.clients(number)
        updates, found = [], []
        for client in clients:
            put(parameters, values)
            found.append(train(work, model, number, client, bf16))
            updates.append({name: p.detach().clone() for name, p in parameters.items()})
        values = mean(updates, [work.weight(client) for client in clients])
        losses.append(sum(found) / len(found))
    return began, time.time(), losses


def empty(work: Work) -> tuple[float, float, list[float]]:
    """Every client adds 1 to what it received; the mean is made as updates arrive."""
    values = work.initial()
    began = time.time()
    for number in range(work.rounds):
        clients = work.clients(number)
        total: Tensors = {name: torch.zeros_like(t) for name, t in values.items()}
        for _ in clients:
            update = {name: t + 1 for name, t in values.items()}
            for name, t in update.items():
                total[name] += t
        values = {name: t / len(clients) for name, t in total.items()}
    return began, time.time(), [average(values)]


def main() -> None:
    """Run and write."""
    asked = arguments(["fp32", "bf16"])
    work = Work.read(asked.job)
    began, done, losses = empty(work) if work.kind == "empty" else text(work, asked.mode == "bf16")
    work.report(asked.out, "plain", asked.mode, startup_s=began - BEGAN, train_s=done - began, losses=losses)


if __name__ == "__main__":
    main()
