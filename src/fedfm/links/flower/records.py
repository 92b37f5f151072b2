"""What server and clients write into Flower's records, and how it is read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from flwr.app import Array, ArrayRecord

from fedfm.core.method import Method
from fedfm.core.update import Tensors
from fedfm.errors import BadUpdate
from fedfm.wire.stage import Stage

Ticket = tuple[int, int]
NEVER: Ticket = (0, 0)
"""No task of this client was admitted."""
AS_IT_IS: Ticket = (-1, -1)
"""The server looks after the client's store itself."""


def alike(method: Method, stages: Sequence[Stage], seed: int, hide_metrics: bool) -> dict[str, str]:
    """What the recipes of server and client must have in common."""
    return {"method": repr(method), "stages": repr(tuple(stages)), "seed": f"{seed}", "hiding": f"{hide_metrics}"}


def packed(data: bytes) -> ArrayRecord:
    return ArrayRecord({"bytes": Array("uint8", (len(data),), "fedfm", data)})


def order(tensors: Tensors) -> list[int]:
    """The place of each name among the sorted names."""
    places = {name: place for place, name in enumerate(sorted(tensors))}
    return [places[name] for name in tensors]


def in_order(tensors: Tensors, order: Sequence[int]) -> dict[str, torch.Tensor]:
    """The tensors in the order in which they were packed."""
    names = sorted(tensors)
    if sorted(order) != list(range(len(names))):
        raise BadUpdate("the order of its tensors is not one")
    return {names[place]: tensors[names[place]] for place in order}
