"""YAML that somebody else wrote: plain values alone, and no more of them than a person would write."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

from fedfm.errors import RecipeError

MOST_CHARACTERS = 1 << 20
MOST_DEPTH = 100
"""Brackets in each other: the time that PyYAML takes grows with their square."""
MOST_VALUES = 20_000
"""Values when all anchors are written out: a few lines of nested anchors can stand for billions."""


def loads(text: str) -> Any:
    """The value of a YAML document.

    Raises:
        yaml.YAMLError: it is not YAML, too long, or holds what is no plain value.
    """
    if len(text) > MOST_CHARACTERS:
        raise yaml.YAMLError(f"it has {len(text)} characters, more than {MOST_CHARACTERS}")
    if _depth(text) > MOST_DEPTH:
        raise yaml.YAMLError(f"it has more than {MOST_DEPTH} brackets in each other")
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        return loader.construct_document(node)
    except (ValueError, LookupError, AttributeError, TypeError, OverflowError, RecursionError) as error:
        raise yaml.YAMLError(f"it holds a value that cannot be read: {error!r:.200}") from error
    finally:
        loader.dispose()


def mapping(path: Path, absent: str) -> dict[str, Any]:
    """The mapping in a YAML file.

    Args:
        path: the file.
        absent: what to do when there is none.

    Raises:
        RecipeError: there is none, or it holds something else.
    """
    try:
        content = loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"there is no {path}. {absent}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read {path}: {error}.") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path} must be a mapping of keys, but holds {type(content).__name__}.")
    return content


def _depth(text: str) -> int:
    """The most brackets that are open at once, also of those in quotes."""
    steps = (1 if c in "[{" else -1 for c in text if c in "[]{}")
    return max(accumulate(steps), default=0)


def _count(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Values in a node when its anchors are written out; ``sizes`` of those counted, 0 while they are."""
    if (known := sizes.get(id(node))) is not None:
        if not known:
            raise yaml.YAMLError("an anchor holds itself")
        return known
    sizes[id(node)] = 0
    below: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        below = list(node.value)
    elif isinstance(node, yaml.MappingNode):
        below = [part for pair in node.value for part in pair]
    sizes[id(node)] = size = 1 + sum(_count(part, sizes) for part in below)
    if size > MOST_VALUES:
        raise yaml.YAMLError(f"written out, its anchors make more than {MOST_VALUES} values")
    return size
