"""Federations of a tiny classifier, for attacks that train in ways of their own."""

from __future__ import annotations

from typing import Any

from fedfm.core.plan import Training
from fedfm.evaluate import Evaluation
from fedfm.federation import Federation
from fedfm.methods.fedavg import FedAvg
from fedfm.sample import Uniform
from fedfm.spaces import Space
from fedfm.tasks import Classify
from fedfm.train.bench import Bench
from tests.conftest import People

WORDS = ("sun", "rain", "snow")
TRAINING = Training(max_steps=3, per_device_train_batch_size=9, learning_rate=3e-3)


def rows(n: int, at: int) -> list[dict[str, Any]]:
    """Texts whose first word says their class."""
    return [{"text": f"{WORDS[(at + i) % 3]} {i}", "label": (at + i) % 3} for i in range(n)]


CLIENTS = People({f"c{k}": {"train": rows(9, k), "validation": rows(3, k), "test": rows(6, k + 1)} for k in range(5)})


def made(bench: Bench, space: Space, **changes: Any) -> Federation:
    """A federation of five clients, all in each round, on a bench with this space."""
    given: dict[str, Any] = {
        "space": space,
        "training": TRAINING,
        "rounds": 2,
        "sampler": Uniform(fraction=1.0),
        "evaluation": Evaluation(every=0),
        **changes,
    }
    return Federation(bench, FedAvg(), CLIENTS, Classify(), **given)
