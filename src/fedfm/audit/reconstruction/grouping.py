"""Which of the tokens that were found in a change of weights stand in one row, and in which order.

Letters in shapes: C width of the code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.cluster.hierarchy import fcluster, linkage

NEAR = 0.1
"""How far apart codes of one row may be, in units of the spread of what they are made of."""
DRIFT = 0.01
"""How far from what a token contributes the difference of two codes may be, for each token before it."""


@dataclass(frozen=True)
class Item:
    """A token that was found.

    Args:
        token: its id.
        place: in its row; 0 where the code alone tells.
        code: the mean of what tokens contribute, over the row, or over the row up to this token, ``[C]``.
        own: what this token contributes, ``[C]``.
        sure: how like it is to the token.
    """

    token: int
    place: int
    code: torch.Tensor
    own: torch.Tensor
    sure: float


def by_code(items: Sequence[Item], lengths: Sequence[int]) -> list[list[int]]:
    """Rows of tokens whose codes are of whole rows and whose places are known.

    A token that stood at the same place of several rows is found once, with a code that is none of theirs: it is put
    wherever nothing else was found.

    Args:
        items: what was found.
        lengths: of the rows.
    """
    items = single(items)
    if len(items) < 2:
        return [[item.token] for item in items]
    joined = fcluster(linkage(torch.stack([i.code for i in items]).numpy(), "average"), NEAR, "distance").tolist()
    sizes = sorted(set(joined), key=lambda group: -joined.count(group))[: len(lengths)]
    rows: dict[int, dict[int, int]] = {group: {} for group in sizes}
    stray = []
    for item, group in zip(items, joined, strict=True):
        if group in rows:
            rows[group].setdefault(item.place, item.token)
        else:
            stray.append(item)
    for item in stray:
        for row in rows.values():
            row.setdefault(item.place, item.token)
    return [[row[place] for place in sorted(row)] for row in rows.values()]


def by_prefix(items: Sequence[Item], lengths: Sequence[int], own: torch.Tensor) -> list[list[int]]:
    """Rows of tokens whose codes are of the row up to them: $p h_p - (p - 1) h_{p-1}$ is what token p contributes.

    Rows that begin alike share what was found of their beginning. Of a token that was not found what it contributes is
    known where those on both sides of it were.

    Args:
        items: what was found.
        lengths: of the rows.
        own: what each token of the vocabulary contributes, ``[V, C]``.
    """
    left = single(items)
    ends: list[tuple[torch.Tensor, tuple[int, ...]]] = [(torch.zeros(own.shape[1]), ())]
    paths: list[tuple[int, ...]] = []
    # Ends that were reached over a gap wait for their turn.
    waiting: list[tuple[torch.Tensor, tuple[int, ...]]] = []
    for place in range(1, max(lengths) + 1):
        grown, waiting = waiting, []
        for total, path in ends:
            after = [item for item in left if _apart(item, place, total) < DRIFT * place]
            grown += [(place * item.code, (*path, item.token)) for item in after]
            left = [item for item in left if all(item is not one for one in after)]
            if after:
                continue
            found = False
            for item in list(left):
                gap = (place + 1) * item.code - item.own - total
                far, token = (own - gap).norm(dim=1).min(0)
                if float(far) < DRIFT * (place + 1):
                    waiting.append(((place + 1) * item.code, (*path, int(token), item.token)))
                    left = [one for one in left if one is not item]
                    found = True
            if not found:
                paths.append(path)
        ends = grown
    paths += [path for _, path in [*ends, *waiting]]
    return [list(path) for path in sorted(paths, key=len, reverse=True)[: len(lengths)]]


def _apart(item: Item, place: int, total: torch.Tensor) -> float:
    """How far a token at a place is from following what adds up to ``total``."""
    return float((place * item.code - item.own - total).norm())


def single(items: Sequence[Item]) -> list[Item]:
    """Each token of a row once, the surest: one near a threshold is found on both sides of it."""
    kept: list[Item] = []
    for item in sorted(items, key=lambda one: -one.sure):
        same = (one for one in kept if (one.token, one.place) == (item.token, item.place))
        if all(float((one.code - item.code).norm()) > DRIFT for one in same):
            kept.append(item)
    return kept
