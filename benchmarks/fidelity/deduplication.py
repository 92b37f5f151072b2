"""Duplicates across clients: how many are found, what that takes, and what it saves.

    PYTHONPATH=src:. python -m benchmarks.fidelity.deduplication

writes ``deduplication.json`` beside this file. The figures in ``docs/deduplication.md`` are from there.
"""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from benchmarks.fidelity.scenarios import DATA
from fedfm.core import seeds
from fedfm.data import Chatterbot, Iid, Natural, Partition, Source, federate
from fedfm.dedup import Deduplication, Exact, Near
from fedfm.dedup.deduplication import plain
from fedfm.results import machine

RESULTS = Path(__file__).parent / "deduplication.json"
ROWS, SAME = 10_000, 0.12
"""Rows in all; the share of them that are copies, and the same share again with a word changed."""


def planted() -> tuple[Dataset, int]:
    """News in full with copies, and how many distinct texts they were made of.

    Raises:
        FileNotFoundError: the data beside the project are absent.
    """
    with (DATA / "ag_news.csv").open(newline="", encoding="utf-8") as file:
        texts = [f"{title} {body}" for _, title, body in csv.reader(file)]
    draw = seeds.numpy_generator(0, "fidelity", "duplicates")
    count = round(ROWS * SAME)
    own = texts[: ROWS - 2 * count]
    copies = [own[i] for i in draw.choice(len(own), count, replace=False)]
    edited = [changed(own[i], draw) for i in draw.choice(len(own), count, replace=False)]
    return Dataset.from_dict({"text": [*own, *copies, *edited]}), len(own)


def changed(text: str, draw: np.random.Generator) -> str:
    """The text with one of its words replaced."""
    words = text.split()
    words[int(draw.integers(len(words)))] = "something"
    return " ".join(words)


def look(source: Source | Dataset, partition: Partition, kind: Deduplication) -> dict[str, Any]:
    """What is found, and the time it takes beyond dealing the rows."""
    began = time.monotonic(), time.process_time()
    before = federate(source, partition, seed=1)
    between = time.monotonic(), time.process_time()
    after = federate(source, partition, seed=1, deduplicate=kind)
    end = time.monotonic(), time.process_time()
    sizes = [sum(len(json.dumps(row)) for i in some.ids for row in some.everything(i)) for some in (before, after)]
    wall, processor = (round((e - b) - (b - a), 2) for a, b, e in zip(began, between, end, strict=True))
    return {
        "clients": len(before),
        "rows": int(before.sizes().sum()),
        "left": int(after.sizes().sum()),
        "text_saved": round(1 - sizes[1] / sizes[0], 4),
        "seconds": wall,
        "processor_seconds": processor,
    }


def main() -> None:
    """Measure and write."""
    data, distinct = planted()
    found: dict[str, Any] = {"machine": machine(), "distinct": distinct, "news": {}, "chatterbot": {}}
    for kind in (Exact(), Near()):
        found["news"][kind.id] = look(data, Iid(4), kind)
        found["chatterbot"][kind.id] = look(Chatterbot(), Natural("topic"), kind)
        print(kind.id, found["news"][kind.id], found["chatterbot"][kind.id], flush=True)
    found["news"]["brute-force"] = brute(data)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


def brute(data: Dataset) -> dict[str, Any]:
    """Pairs of a text and an edited one with at least 0.8 of their 5-grams in common, and how many of them match."""
    kind, texts = Near(), [plain({"text": text}) for text in data["text"]]
    own, edited = texts[:800], texts[-round(ROWS * SAME) :]
    grams = [[kind.shingles(text) for text in some] for some in (own, edited)]
    prints = [[set(kind.fingerprints(text, "")) for text in some] for some in (own, edited)]
    pairs, match = set(), set()
    for i, (g, p) in enumerate(zip(grams[0], prints[0], strict=True)):
        for j, (h, q) in enumerate(zip(grams[1], prints[1], strict=True)):
            pairs |= {(i, j)} if len(g & h) >= 0.8 * len(g | h) else set()
            match |= {(i, j)} if p & q else set()
    both = len(pairs & match)
    return {"pairs": len(pairs), "found": len(match), "recall": both / len(pairs), "precision": both / len(match)}


if __name__ == "__main__":
    main()
