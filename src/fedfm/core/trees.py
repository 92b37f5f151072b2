"""Arithmetic on named tensors, and which names a pattern means.

A *tree* here is flat: a mapping of names to tensors. Every function returns a new mapping and leaves its arguments as
they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import torch

from fedfm.core.update import Tensors

Patterns = tuple[str, ...]
"""Name patterns. ``*`` and ``?`` are wildcards; a pattern means a name when it matches all of it or one of its
dot-separated parts, so ``lora_B`` means every LoRA B factor. A ``!`` in front takes names out again:
``("*", "!lora_A")`` means everything but LoRA A factors."""


def matches(name: str, patterns: Patterns) -> bool:
    """Whether one of ``patterns`` means ``name``.

    >>> matches("layers.0.q_proj.lora_B.weight", ("lora_B",))
    True
    >>> matches("layers.0.q_proj.lora_B.weight", ("lora_A", "layers.1.*"))
    False
    >>> matches("classifier.weight", ("*", "!lora_A"))
    True
    """
    return any(_means(p, name) for p in patterns if p[:1] != "!") and not any(
        _means(p[1:], name) for p in patterns if p[:1] == "!"
    )


def _means(pattern: str, name: str) -> bool:
    return pattern == "*" or fnmatchcase(name, pattern) or any(fnmatchcase(p, pattern) for p in name.split("."))


def select(tensors: Tensors, patterns: Patterns) -> dict[str, torch.Tensor]:
    """The tensors that ``patterns`` mean, in their order."""
    return {name: tensor for name, tensor in tensors.items() if matches(name, patterns)}


def without(tensors: Tensors, patterns: Patterns) -> dict[str, torch.Tensor]:
    """The tensors that ``patterns`` do not mean, in their order."""
    return {name: tensor for name, tensor in tensors.items() if not matches(name, patterns)}


def add(left: Tensors, right: Tensors, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """``left + scale * right`` for the names of ``right``; other names of ``left`` stay as they are."""
    same_names(right, left, "right", "left")
    return {n: torch.add(t, right[n].to(t.dtype), alpha=scale) if n in right else t for n, t in left.items()}


def subtract(left: Tensors, right: Tensors) -> dict[str, torch.Tensor]:
    """``left - right``, name by name; both have the same names."""
    same_names(left, right, "left", "right")
    same_names(right, left, "right", "left")
    return {name: tensor - right[name] for name, tensor in left.items()}


def scale(tensors: Tensors, factor: float) -> dict[str, torch.Tensor]:
    """``factor * tensors``."""
    return {name: (wide(tensor) * factor).to(tensor.dtype) for name, tensor in tensors.items()}


def norm(tensors: Tensors) -> float:
    """The Euclidean norm of all tensors taken as one vector, accumulated in float64."""
    parts = [torch.linalg.vector_norm(wide(t), dtype=torch.float64) for t in tensors.values()]
    return float(torch.linalg.vector_norm(torch.stack(parts))) if parts else 0.0


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32, or as it is when it is float32 or wider."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def unshared(tensors: Tensors) -> dict[str, torch.Tensor]:
    """The tensors, contiguous and without common memory, as safetensors wants them; copied only where needed."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        one = tensor.detach().contiguous()
        place = one.untyped_storage().data_ptr()
        result[name] = one.clone() if place in seen and one.numel() else one
        seen.add(place)
    return result


def nbytes(tensors: Tensors) -> int:
    """Bytes of the tensors' own data."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def count(tensors: Tensors) -> int:
    """Number of scalars in the tensors."""
    return sum(tensor.numel() for tensor in tensors.values())


def clone(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Copies that share no memory with ``tensors``."""
    return {n: t.detach().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}


def total(trees: Iterable[Tensors]) -> dict[str, torch.Tensor]:
    """The sum of the trees, name by name; a name that a tree lacks counts as zero."""
    result: dict[str, torch.Tensor] = {}
    for tree in trees:
        for name, tensor in tree.items():
            result[name] = result[name] + tensor if name in result else tensor
    return result


def mark(slot: str, tensors: Tensors) -> dict[str, torch.Tensor]:
    """``tensors`` under the names ``slot:name``, so that several tensors of one name fit in a message.

    >>> list(mark("c", {"w": torch.zeros(1)}))
    ['c:w']
    """
    return {f"{slot}:{name}": tensor for name, tensor in tensors.items()}


def marked(slot: str, tensors: Tensors) -> dict[str, torch.Tensor]:
    """What :func:`mark` put under ``slot``, by plain name; the slot ``""`` holds what bears no mark."""
    return {n.rpartition(":")[2]: t for n, t in tensors.items() if n.rpartition(":")[0] == slot}


def same_names(inner: Mapping[str, object], outer: Mapping[str, object], first: str, second: str) -> None:
    """Raise ``KeyError`` unless every name of ``inner`` is in ``outer``."""
    if missing := [name for name in inner if name not in outer]:
        raise KeyError(f"{len(missing)} names of {first} are not in {second}, such as {missing[0]!r}")
