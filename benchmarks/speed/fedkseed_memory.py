"""FedKSeed on SmolLM2-135M: bytes of a client in a round, and memory beside that of inference alone.

    python -m benchmarks.speed.fedkseed_memory   # prints the figures and writes results/fedkseed_memory.json

Inference scores the training rows of every client one by one, FedKSeed runs a round with the same clients; each in a
process of its own, on the same federation. Memory is the largest resident size from the moment at which the model is
loaded (Linux). The largest tensor of the model is the one buffer that FedKSeed may add.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.fidelity.trial import forget_peak, peak
from fedfm import Chat, Federation, Training, federate, load
from fedfm.core import trees
from fedfm.core.client import View
from fedfm.core.jobs import Loss
from fedfm.data import Chatterbot, Natural, Splits
from fedfm.evaluate import Evaluation
from fedfm.methods.zeroth.fedkseed import FedKSeed
from fedfm.results import machine
from fedfm.spaces import Full
from fedfm.store.files import write_json

RESULT = Path(__file__).parent / "results" / "fedkseed_memory.json"
STEPS = Training(max_steps=5, per_device_train_batch_size=1, per_device_eval_batch_size=1, learning_rate=1e-6)


def federation() -> Federation:
    """Three clients of a topic each, all parameters tuned."""
    rows = Chatterbot(topics=("ai", "emotion", "psychology"))
    members = federate(rows, Natural("topic"), Splits(validation=0.1, test=0.35), 0, max_examples=12)
    return Federation(
        load("smollm2-135m-instruct"),
        FedKSeed(),
        members,
        Chat(max_length=72),
        space=Full(),
        training=STEPS,
        rounds=1,
        evaluation=Evaluation(every=0),
    )


def measured(what: str) -> dict[str, float]:
    """Peak memory of ``inference`` or of a ``round``, and what the round sent."""
    made = federation()
    sizes = [trees.nbytes({n: p}) / 1e6 for n, p in made.bench.space.parameters.items()]
    forget_peak()
    found = {"loaded_mb": float(peak())}
    if what == "inference":
        for id in made.ids:
            member = made.plan.members.member(id)
            scores = made.trainer.answer(Loss({}), View(member, 1, space=made.layout))
            assert len(scores.loss) == member.examples
    else:
        record = made.run().records[1]
        clients = len(record["participants"])
        found |= {f"bytes_{way}_a_client": record[f"bytes_{way}"] / clients for way in ("up", "down")}
        found["seconds_a_step"] = record["seconds"] / clients / STEPS.max_steps
    return {**found, "peak_mb": float(peak()), "model_mb": sum(sizes), "largest_tensor_mb": max(sizes)}


def main() -> int:
    """Measure both, print, write. Returns 1 when a promise is broken."""
    found: dict[str, Any] = {}
    for what in ("inference", "round"):
        command = [sys.executable, "-m", "benchmarks.speed.fedkseed_memory", what]
        found[what] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
    extra = found["round"]["peak_mb"] - found["inference"]["peak_mb"]
    allowed = found["round"]["largest_tensor_mb"]
    found |= {"more_than_inference_mb": extra, "machine": machine()}
    write_json(RESULT, found)
    print(f"bytes up, a client and round    {found['round']['bytes_up_a_client']:10.0f}   wanted below 20000")
    print(f"peak of inference               {found['inference']['peak_mb']:10.0f} MB")
    print(f"peak of a round                 {found['round']['peak_mb']:10.0f} MB")
    print(f"difference                      {extra:10.0f} MB   wanted at most {allowed:.0f}, the largest tensor")
    print(f"seconds a step                  {found['round']['seconds_a_step']:10.2f}")
    return int(found["round"]["bytes_up_a_client"] >= 20_000 or extra > allowed)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measured(sys.argv[1])))
    else:
        sys.exit(main())
