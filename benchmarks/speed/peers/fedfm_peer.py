"""fedfm itself, through its public names.

    python benchmarks/speed/peers/fedfm_peer.py JOB OUT.json
        [--mode default|sequential|fused|sequential-bf16|fused-bf16]

``default`` leaves engine and precision as a federation has them when nothing is said; the others set both. There is no
evaluation and no run folder.

The clock starts before ``Federation.run``, with model, space and trainer in memory and the rows tokenised, as the other
peers are given tokens; it stops when ``run`` returns.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from work import BEGAN, Work, arguments, average

from fedfm import CausalLM, Chat, Classify, Federation, FedIT, LoRA, Method, Training, Uniform, from_rows, load
from fedfm.core.method import Client, State
from fedfm.core.method import Work as Jobs
from fedfm.core.space import Layout
from fedfm.core.update import Tensors, Update
from fedfm.data import Population, Splits
from fedfm.evaluate import Evaluation
from fedfm.observe import Observer
from fedfm.train import Trainer
from fedfm.train.fused import Fused

MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "sequential": {"engine": Trainer, "bf16": False},
    "fused": {"engine": Fused, "bf16": False},
    "sequential-bf16": {"engine": Trainer, "bf16": True},
    "fused-bf16": {"engine": Fused, "bf16": True},
}


@dataclass(frozen=True)
class Idle(Method):
    """Client work that trains nothing: every client adds 1 to what it received.

    Args:
        tensors: what the first round sends.
    """

    tensors: Tensors

    def start(self, space: Layout) -> State:
        return State(self.tensors)

    def local(self, client: Client, message: Tensors) -> Jobs:
        yield from ()
        return Update({name: torch.ones_like(t) for name, t in message.items()}, weight=client.member.examples)

    def result(self, state: State, space: Layout) -> Tensors:
        return {}


class Watch(Observer):
    """Notes what each round gave."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def round_finished(self, record: Mapping[str, Any]) -> None:
        if record["round"]:
            found = [client["loss"] for client in record["participants"].values() if "loss" in client]
            self.losses.append(math.fsum(found) / max(1, len(found)))


def members(work: Work) -> Population:
    """The clients of the job with all their rows to train on."""
    rows = {client: about["rows"] for client, about in work.about["clients"].items()}
    return from_rows(rows, Splits(validation=0, test=0, group_by=""), work.about["seed"])


def federation(work: Work, mode: Mapping[str, Any]) -> Federation:
    """The job as a federation."""
    about = work.about
    engine = {"engine": mode["engine"]} if "engine" in mode else {}
    precision = {"bf16": mode["bf16"]} if "bf16" in mode else {}
    head = "sequence_classification" if work.kind == "classify" else "causal_lm"
    tasks = {"chat": Chat, "classify": Classify, "empty": CausalLM}
    lora = {name: tuple(v) if isinstance(v, list) else v for name, v in about["lora"].items()}
    return Federation(
        load(str(work.folder / "model"), head=head),
        Idle(work.initial()) if work.kind == "empty" else FedIT(),
        members(work),
        tasks[work.kind](**about["task"]),
        space=LoRA(**lora),
        training=Training(**about["training"], **precision),
        rounds=work.rounds,
        sampler=Uniform(count=len(work.clients(0))),
        evaluation=Evaluation(every=0),
        seed=about["seed"],
        **engine,
    )


def main() -> None:
    """Run and write."""
    warnings.filterwarnings("ignore")
    asked = arguments(list(MODES))
    work = Work.read(asked.job)
    ready, watch = federation(work, MODES[asked.mode]), Watch()
    trainer = ready.trainer
    if work.kind != "empty":
        first = work.initial()
        if any(not torch.equal(t, first[name]) for name, t in ready.layout.initial.items()):
            raise ValueError("the adapter's first values are not those of the job; prepare it anew")
        for client in sorted({c for number in range(work.rounds) for c in work.clients(number)}):
            trainer.encoded(client, "train")
    else:
        for client in ready.ids:
            ready.plan.members.member(client)  # a client's split is drawn when it is first seen
    began = time.time()
    outcome = ready.run(observers=[watch])
    done = time.time()
    for record in outcome.records[1:]:
        if record["dropped"] or list(record["participants"]) != work.clients(record["round"] - 1):
            raise ValueError(f"round {record['round']} was not that of the job: {record['dropped']}")
    losses = [average(outcome.state.weights)] if work.kind == "empty" else watch.losses
    work.report(asked.out, "fedfm", asked.mode, startup_s=began - BEGAN, train_s=done - began, losses=losses)


if __name__ == "__main__":
    main()
