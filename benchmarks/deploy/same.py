"""Whether two run folders hold the same run: weights bit for bit, the server's state, every loss."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.deploy.commands import Done, rounds


def final(place: Path) -> dict[str, torch.Tensor]:
    """What was saved as the global model; nothing where a method has none."""
    return _read(sorted((place / "final").glob("*.safetensors")))


def state(place: Path) -> dict[str, torch.Tensor]:
    """The server's state after the last round: weights, control variates, moments, stacks."""
    return _read(sorted(sorted((place / "checkpoints").glob("round-*"))[-1].glob("*.safetensors")))


def _read(files: list[Path]) -> dict[str, torch.Tensor]:
    return {f"{file.name}:{name}": tensor for file in files for name, tensor in load_file(file).items()}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes: zeros of either sign differ, and a number that is none equals itself."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def equal(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    """Whether names, types, shapes and all bits are the same."""
    return a.keys() == b.keys() and all(
        t.dtype == b[n].dtype and t.shape == b[n].shape and torch.equal(bits(t), bits(b[n])) for n, t in a.items()
    )


def apart(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> float | None:
    """The largest difference of a number from one to the other; ``None`` where names or shapes differ."""
    if a.keys() != b.keys() or any(t.shape != b[n].shape for n, t in a.items()):
        return None
    return max((float((t.double() - b[n].double()).abs().max()) for n, t in a.items() if t.numel()), default=0.0)


def losses(done: Done) -> list[Any]:
    """All losses of a run: of each client and round, of each validation, and of each client's test."""
    found: list[Any] = []
    for record in rounds(done.records()):
        clients = {name: client.get("loss") for name, client in sorted(record["participants"].items())}
        found.append([record["round"], record["train_loss"], clients, record["validation"]])
    return [found, done.results()["test"]]


def compared(one: Done, other: Done) -> dict[str, Any]:
    """What two runs have in common.

    Returns:
        ``weights``, ``state`` and ``losses`` that are equal, all three as ``equal``; the number of ``tensors`` and
        of ``numbers`` of the global model, or of the state where there is none; and how far weights are ``apart``.
    """
    weights, states = (final(one.place), final(other.place)), (state(one.place), state(other.place))
    looked = weights if weights[0] else states
    found = {
        "weights": equal(*weights) if weights[0] or weights[1] else None,
        "state": equal(*states),
        "losses": losses(one) == losses(other),
    }
    return {
        "equal": all(value is not False for value in found.values()),
        **found,
        "tensors": len(looked[0]),
        "numbers": sum(t.numel() for t in looked[0].values()),
        "apart": apart(*looked),
    }
