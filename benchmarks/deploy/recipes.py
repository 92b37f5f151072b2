"""Recipes that are quick on a real model: MiniLM or SmolLM2, and rows of the package chatterbot-corpus.

Three clients, dealt by chance or by topic; few steps, plain float32, clients one after the other: what is tuned at a
site is computed alone, so at home it must not be computed together with others.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from benchmarks.deploy.commands import SITES

ROWS = 60
"""Of each client."""
BRIEF = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 2e-3, "bf16": False}
PLAIN = {**BRIEF, "learning_rate": 0.05, "optim": "sgd", "max_grad_norm": 0.0}
"""Plain SGD, for methods that are about gradients."""

COMMON: dict[str, Any] = {"rounds": 2, "engine": "sequential", "samples": 0, "evaluation": {"every": 2}}


def texts(folder: Path) -> Path:
    """Write questions with their topic as class, dealt to the clients by chance."""
    from benchmarks.fidelity.scenarios import topics

    place = folder / "questions.jsonl"
    names = ("trivia", "emotion", "ai", "coding", "psychology")
    rows = topics().some(SITES * ROWS, seed=0)
    lines = [
        json.dumps({"text": row["text"], "label": names[row["label"]], "holder": f"site-{i % SITES + 1}"})
        for i, row in enumerate(rows)
    ]
    place.write_text("\n".join(lines) + "\n")
    return place


def classes(folder: Path) -> dict[str, Any]:
    """Questions to classify by MiniLM: LoRA in the last block, and a new head."""
    return {
        **COMMON,
        "model": "all-minilm-l6-v2",
        "method": "fedavg",
        "space": {"kind": "lora", "r": 4, "lora_alpha": 16, "layers_to_transform": [5]},
        "task": {"kind": "classify", "max_length": 24},
        "data": {
            "source": {"kind": "file", "path": str(texts(folder))},
            "partition": {"kind": "natural", "column": "holder"},
        },
        "training": BRIEF,
    }


def whole(folder: Path) -> dict[str, Any]:
    """The same with all weights of MiniLM."""
    return {**classes(folder), "space": "full"}


def masked(folder: Path) -> dict[str, Any]:
    """The same questions, with words to guess, and all weights of a small BERT that knows nothing yet.

    MiniLM comes without the head that guesses words.
    """
    from benchmarks.fidelity.scenarios import fresh_bert

    model = folder / "model"
    if not model.exists():
        shutil.copytree(fresh_bert(), model)
    task = {"kind": "masked-lm", "max_length": 24}
    return {**classes(folder), "model": str(model), "task": task, "space": "full"}


def dialogues(folder: Path) -> dict[str, Any]:
    """Dialogues for SmolLM2, one topic a client: LoRA in the two last blocks."""
    return {
        **COMMON,
        "model": "smollm2-135m-instruct",
        "method": "fedit",
        "space": {"kind": "lora", "r": 4, "lora_alpha": 16, "layers_to_transform": [28, 29]},
        "task": {"kind": "chat", "max_length": 72},
        "data": {
            "source": {"kind": "chatterbot", "languages": ["english"]},
            "partition": {"kind": "natural", "column": "topic"},
            "min_examples": 12,
            "max_examples": 12,
        },
        "training": {**BRIEF, "per_device_train_batch_size": 2, "learning_rate": 5e-3},
    }


def demo(folder: Path) -> dict[str, Any]:
    """recipes/demo.yaml itself, shorter, without what needs all rows in one place."""
    whole: dict[str, Any] = yaml.safe_load((Path(__file__).parents[2] / "recipes" / "demo.yaml").read_text())
    return {**whole, "rounds": 2, "references": [], "samples": 0, "engine": "sequential"}


MAKERS = {"classes": classes, "whole": whole, "masked": masked, "dialogues": dialogues, "demo": demo}
"""How a recipe is made, by the name that cases use."""


def written(kind: str, changes: Mapping[str, Any], place: Path) -> Path:
    """Write a recipe.

    Args:
        kind: which of ``MAKERS``.
        changes: of its top-level keys; a mapping under ``data`` is added to what is there.
        place: the file.
    """
    content = MAKERS[kind](place.parent)
    merged = {**content, **changes, "data": {**content["data"], **changes.get("data", {})}}
    place.write_text(yaml.safe_dump(merged, sort_keys=False))
    return place
