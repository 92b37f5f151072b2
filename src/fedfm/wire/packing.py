"""What encoding stages share: names and shapes beside packed values, small integers packed into bytes, their place.

An encoding stage puts the values of all tensors into a few vectors. Beside these it sends, for each tensor, a
*placeholder*: a tensor of the shape ``[0, *shape]`` under a marked name. It has no bytes of its own; name, type and
shape travel in the header, as they do for every tensor.
"""

from __future__ import annotations

import math

import torch

from fedfm.core.update import Tensors
from fedfm.errors import BadUpdate, Incompatible
from fedfm.wire.stage import Setting, Stage


def placeholders(slot: str, tensors: Tensors) -> dict[str, torch.Tensor]:
    """For each tensor one of its type and of the shape ``[0, *shape]``, called ``slot:name``."""
    return {f"{slot}:{name}": tensor.new_empty((0, *tensor.shape)) for name, tensor in tensors.items()}


def shapes(slot: str, tensors: Tensors, like: Tensors | None) -> dict[str, torch.Size]:
    """What :func:`placeholders` put in, as shapes by plain name, in the order of names.

    Args:
        slot: the mark.
        tensors: what arrived.
        like: what the names and shapes must be, if that is known.

    Raises:
        BadUpdate: something under the mark is not a placeholder, or names and shapes are not those of ``like``.
    """
    found = {}
    for marked, tensor in sorted(tensors.items()):
        if marked.startswith(f"{slot}:"):
            if tensor.dim() < 1 or tensor.shape[0] != 0:
                raise BadUpdate(f"tensor {marked!r} has shape {list(tensor.shape)}, not [0, ...]")
            found[marked.removeprefix(f"{slot}:")] = tensor.shape[1:]
    # Before anything of these sizes is allocated: a shape is a claim of the client.
    if like is not None:
        for name in sorted(found.keys() | like.keys()):
            asked = like[name].shape if name in like else None
            if found.get(name) != asked:
                raise BadUpdate(f"tensor {name!r} has shape {_shown(found.get(name))}, not {_shown(asked)}")
    return found


def part(tensors: Tensors, name: str, dtypes: tuple[torch.dtype, ...], length: int | None = None) -> torch.Tensor:
    """The vector called ``name``.

    Raises:
        BadUpdate: it is absent, or of another type or length.
    """
    if name not in tensors:
        raise BadUpdate(f"tensor {name!r} is missing")
    tensor = tensors[name]
    if tensor.dtype not in dtypes or tensor.dim() != 1 or (length is not None and len(tensor) != length):
        wanted = f"[{'...' if length is None else length}]"
        raise BadUpdate(f"tensor {name!r} holds {tensor.dtype} {list(tensor.shape)}, not {dtypes[0]} {wanted}")
    return tensor


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes ``[d]`` of 2, 4 or 8 ``bits`` each, in ``uint8``, as bytes ``[ceil(d * bits / 8)]``; the first is lowest.

    >>> pack(torch.tensor([1, 2, 3], dtype=torch.uint8), 4).tolist()
    [33, 3]
    """
    per = 8 // bits
    rows = torch.nn.functional.pad(codes, (0, -len(codes) % per)).view(-1, per)
    packed = torch.zeros(len(rows), dtype=torch.uint8, device=codes.device)
    for i in range(per):
        packed |= rows[:, i] << (bits * i)
    return packed


def unpack(packed: torch.Tensor, bits: int, d: int) -> torch.Tensor:
    """The codes ``[d]`` that :func:`pack` packed.

    >>> unpack(torch.tensor([33, 3], dtype=torch.uint8), 4, 3).tolist()
    [1, 2, 3]
    """
    shifts = range(0, 8, bits)
    return torch.stack([(packed >> shift) & (2**bits - 1) for shift in shifts], dim=1).flatten()[:d]


def total(shapes: dict[str, torch.Size]) -> int:
    """Number of scalars in tensors of these shapes; exact, however large the claim."""
    return sum(math.prod(shape) for shape in shapes.values())


def must_be_last(stage: Stage, setting: Setting, but: tuple[type[Stage], ...] = ()) -> None:
    """See that no stage works on what ``stage`` sends, unless it is one of ``but``.

    Raises:
        Incompatible: one does.
    """
    place = next(i for i, one in enumerate(setting.stages) if one is stage)
    for later in setting.stages[place + 1 :]:
        if type(later).send is not Stage.send and not isinstance(later, but):
            raise Incompatible(
                f"{type(later).__name__} cannot work on what {type(stage).__name__} sends, which is packed. "
                f"Put {type(later).__name__} before {type(stage).__name__} in stages."
            )


def _shown(shape: torch.Size | None) -> str:
    return "none" if shape is None else str(list(shape))
