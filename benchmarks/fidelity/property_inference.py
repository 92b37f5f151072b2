"""Property inference measured: what an upload tells of a client's rows as a whole, asked for or not.

    PYTHONPATH=src:. python -m benchmarks.fidelity.property_inference [--page]

writes ``property_inference.json`` beside this file and the last section of ``docs/audits-measured.md``; ``--page`` only
the section, from the numbers that are there.

Clients of AG News headlines, each with a share of a property of its own. Of two such: the topic, which the model is
there to learn; and the agency, AP or Reuters, whose name is cut off, so that only how it writes could tell. As many
headlines of each topic are of either agency; of business AP has too few.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fidelity.scenarios import DATA, minilm
from fedfm.audit import Case
from fedfm.audit.property.feature_leakage import Dealt, FeatureLeakage
from fedfm.core import seeds
from fedfm.core.plan import Training
from fedfm.evaluate import Evaluation
from fedfm.experiment import machine
from fedfm.federation import Federation
from fedfm.methods.fedavg import FedAvg
from fedfm.secure.secagg import SecAgg
from fedfm.spaces import LoRA
from fedfm.tasks import Classify
from fedfm.wire import Clip, LocalGaussian

HERE = Path(__file__).parent
RESULTS = HERE / "property_inference.json"
PAGE = HERE.parents[1] / "docs" / "audits-measured.md"
TITLE = "## Properties of clients"

CLIENTS, EACH, SHADOWS, SEED = 24, 20, 96, 1
TOPICS = ("World", "Sports", "Business", "Sci/Tech")
TAKEN = ("World", "Sports", "Sci/Tech")
BEGINS = re.compile(r"(?:[^-]*\()?(AP|Reuters)\)? - ")
"""A dispatch names its agency before it begins."""
ENDS = re.compile(r"\s*\((AP|Reuters)\)\s*$")
FIELDS = {"label": "the topic, which is learnt", "agency": "the agency, which is not"}
PROTECTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "clip, noise of 0.01 on each upload": {"stages": (Clip(1.0), LocalGaussian(0.01))},
    "clip, noise of 0.1 on each upload": {"stages": (Clip(1.0), LocalGaussian(0.1))},
    "secagg": {"secure": SecAgg()},
}
"""What is tried, as a reader calls it, and as arguments of a federation."""
Rows = list[dict[str, Any]]


@cache
def dispatches() -> Rows:
    """Headlines of two agencies without their names, as many of each topic of each agency."""
    found: dict[tuple[str, str], Rows] = {}
    with (DATA / "ag_news.csv").open(newline="", encoding="utf-8") as file:
        for number, title, text in csv.reader(file):
            topic = TOPICS[int(number) - 1]
            if (agency := BEGINS.match(text)) and topic in TAKEN:
                row = {"text": ENDS.sub("", title), "label": TAKEN.index(topic), "agency": agency[1]}
                found.setdefault((agency[1], topic), []).append(row)
    least = min(map(len, found.values()))
    draw = seeds.numpy_generator(SEED, "property", "rows")
    chosen = [row for rows in found.values() for row in rows[:least]]
    return [chosen[int(at)] for at in draw.permutation(len(chosen))]


def dealt(field: str) -> tuple[dict[str, Rows], Rows]:
    """The clients' rows, each with its own shares of the field, and those of the server; none is in both."""
    rows = dispatches()
    mine, public = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    draw = seeds.numpy_generator(SEED, "property", field)
    by: dict[Any, Rows] = {}
    for row in mine:
        by.setdefault(row[field], []).append(row)
    clients = {}
    for number in range(CLIENTS):
        counts = draw.multinomial(EACH, draw.dirichlet(np.ones(len(by))))
        picked = [(v, int(at)) for v, n in zip(sorted(by), counts, strict=True)
                  for at in draw.permutation(len(by[v]))[:n]]  # fmt: skip
        clients[f"client-{number:02d}"] = [by[v][at] for v, at in picked]
    return clients, public


def case(field: str, protection: Mapping[str, Any]) -> Case:
    """The first round of a run."""
    clients, public = dealt(field)
    run = Federation(
        minilm(),
        FedAvg(),
        Dealt(clients),
        Classify(max_length=24),
        space=LoRA(r=4, lora_alpha=16, layers_to_transform=(5,)),
        training=Training(num_train_epochs=1, learning_rate=1e-3, per_device_train_batch_size=8),
        rounds=1,
        evaluation=Evaluation(every=0),
        seed=SEED,
        load={"num_labels": len(TAKEN)},
        public=public,
        **protection,
    )
    return Case(run, {}, seed=SEED)


def measured() -> dict[str, Any]:
    """All settings."""
    began, found = time.process_time(), {}
    for field in FIELDS:
        for name, protection in PROTECTIONS.items():
            [finding] = FeatureLeakage(field=field, shadows=SHADOWS).look(case(field, protection))
            found[f"{field}, {name}"] = finding.to_json()
            print(field, name, f"{finding.value:.3f} [{finding.low:.3f}, {finding.high:.3f}]", flush=True)
    seconds = round(time.process_time() - began)
    return {"machine": machine(), "processor_seconds": seconds, "rows": len(dispatches()), "findings": found}


def section(results: Mapping[str, Any]) -> str:
    """The section of the page."""

    def cell(field: str, name: str) -> str:
        one = results["findings"][f"{field}, {name}"]
        said = f"{one['value']:.2f} [{one['low']:.2f}, {one['high']:.2f}]"
        return f"**{said}**" if one["leaks"] else said

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    return "\n".join(
        [
            TITLE,
            "",
            "Made by `python -m benchmarks.fidelity.property_inference`; the numbers are in",
            "[property_inference.json](../benchmarks/fidelity/property_inference.json).",
            f"{CLIENTS} clients with {EACH} headlines each of AP and Reuters, whose names are cut off; LoRA in",
            f"MiniLM's last block, trained on topics for one epoch, one round. The server has {results['rows'] // 2}",
            f"other headlines and makes {SHADOWS} shadow clients of them. One seed; {results['processor_seconds']}",
            "seconds of processor time. AUC with which `feature-leakage` tells clients who have more of a value than",
            "the median client from the others; 0.5 is guessing. **Bold**: better than guessing.",
            "",
            line(["protection", *FIELDS.values()]),
            "|---|" + "---:|" * len(FIELDS),
            *(line([name, *(cell(field, name) for field in FIELDS)]) for name in PROTECTIONS),
            "",
            *READING,
            "",
        ]
    )


READING = (
    "What is to be read from it, and what not: one seed, and what is said of one client's topics hangs together,",
    "so the intervals are too narrow there; of the agency each client counts once. An upload tells nearly always",
    "who has more of what is learnt, and often also how a client's rows are written, although the model is never",
    "told who wrote them. Noise of 0.01 hides the second and not the first; what noise costs the model was not",
    "measured here. With `secagg` the server reads the sum alone, in which all clients look alike; what all of",
    "them have most of it may still learn. The shadow clients' rows are of the same source as the clients'; a",
    "server with others would learn less.",
)


def main() -> None:
    """Measure, and write."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--page", action="store_true")
    if not words.parse_args().page:
        RESULTS.write_text(json.dumps(measured(), indent=1) + "\n")
    text = PAGE.read_text()
    before, _, after = text.partition(TITLE)
    _, mark, rest = after.partition("\n## ")
    PAGE.write_text(
        before.rstrip() + "\n\n" + section(json.loads(RESULTS.read_text())) + (f"{mark}{rest}" if mark else "")
    )


if __name__ == "__main__":
    main()
