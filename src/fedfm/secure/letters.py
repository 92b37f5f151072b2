"""What the protocols' messages hold, by name, and how they are read: whoever wrote them is not believed.

==================  ===================  ==========================================================================
task                down                 up
==================  ===================  ==========================================================================
``secure/keys``     nothing              ``keys``: the client's two public keys
``secure/shares``   ``place``, ``peers`` ``sealed``: a text for each other peer; ``commitments`` to what is in them
                    and their ``keys``
of the method       its message and      ``masked``: the vector
                    who is ``present``
``secure/unmask``   ``survivors``,       ``revealed``: a share of each peer who is present
                    ``dropouts`` and
                    ``sealed``
==================  ===================  ==========================================================================

and where uploads are encrypted, with parts in brackets where that is so of some coordinates only:

==================  ===================  ==========================================================================
``secure/keys``     nothing              ``keys``: the client's public key; [``knows``: which mask it has]
``secure/deal``     ``keys`` of all      ``secret``: the key of the round, sealed; ``sealed``: for each, what opens it
                                         (one client is asked)
[``secure/map``]    the method's         ``cipher``: how sensitive each coordinate is
                    message, and as the
                    next
of the method       its message,         ``cipher``: the vector; [``plain``: the coordinates that the mask leaves out,
                    ``keys``, ``dealer`` and ``weight``]
                    ``secret``,
                    ``sealed``,
                    [``mask``]
[``secure/choose``] ``cipher``           ``mask`` (some clients are asked)
``secure/open``     ``cipher``           ``sum`` (some clients are asked)
==================  ===================  ==========================================================================

and where uploads are split into shares:

==================  ===================  ==========================================================================
``secure/keys``     nothing              ``keys``: the client's public key
``secure/deal``     ``keys`` of the      ``sealed``: what gives each holder its share
                    holders;
                    ``clients``
``secure/hold``     ``keys``, ``sealed`` ``opened``: whose it can open (the holders are asked)
of the method       its message          ``share``: what is left of the vector, which is the server's share
``secure/open``     ``survivors``,       ``sum`` of the shares (the holders are asked)
                    ``length``
==================  ===================  ==========================================================================

and where these are judged before they are summed, with the first, third and fourth of that and:

==================  ===================  ==========================================================================
``secure/square``   ``keys`` of the      ``seeds``, ``parts``: the server's part of random vectors and their squares;
                    holder, ``square``   ``sealed``: the holder's (one client is asked)
``secure/check``    ``survivors``,       ``apart``: the same of the holder's share; ``squares``, ``scores``, ``sums``:
                    ``apart``: shares    its parts of what the server finds out (the holder is asked)
                    less random ones,
                    ``direction``,
                    ``challenge``,
                    ``keys``, ``sealed``
``secure/open``     ``weights``,         ``sum`` of the shares, times these
                    ``length``
==================  ===================  ==========================================================================

Clients are numbers from 0 in the order of their ids. A client's *peers* are itself and its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray

from fedfm.core.update import Tensors
from fedfm.errors import BadUpdate

KEYS, SHARES, UNMASK = "secure/keys", "secure/shares", "secure/unmask"
DEAL, HOLD, OPEN = "secure/deal", "secure/hold", "secure/open"
MAP, CHOOSE = "secure/map", "secure/choose"
SQUARE, CHECK = "secure/square", "secure/check"
"""The protocols' own tasks."""
MARK = "secure:"
"""Before the names of the protocol's tensors."""


def bytes_in(tensors: Tensors, name: str, *shape: int) -> NDArray[np.uint8]:
    """The bytes called ``name``, of a shape, of which -1 may be any length.

    Raises:
        BadUpdate: they are not there, or others.
    """
    found = tensors.get(MARK + name)
    sizes = () if found is None else tuple(found.shape)
    alike = len(sizes) == len(shape) and all(wanted in (-1, size) for wanted, size in zip(shape, sizes, strict=True))
    if found is None or found.dtype != torch.uint8 or not alike:
        came = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
        raise BadUpdate(f"{name!r} must be bytes {list(shape)}, but is {came}")
    return found.numpy()


def texts_in(tensors: Tensors, name: str, count: int, most: int) -> list[bytes]:
    """The texts called ``name``.

    Args:
        tensors: what somebody wrote.
        name: of the texts.
        count: how many there must be.
        most: bytes of each, at most.

    Raises:
        BadUpdate: they are not there, or others.
    """
    sizes = numbers_in(tensors, f"{name}-sizes")
    if len(sizes) != count or max(sizes, default=0) > most:
        raise BadUpdate(f"{name!r} must be {count} texts of up to {most} bytes, but is {len(sizes)}")
    whole = bytes_in(tensors, name, sum(sizes)).tobytes()
    return [whole[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True)]


def numbers_in(tensors: Tensors, name: str) -> list[int]:
    """The numbers called ``name``.

    Raises:
        BadUpdate: they are not there, or others.
    """
    found = tensors.get(MARK + name)
    if found is None or found.dtype != torch.int64 or found.dim() != 1 or bool((found < 0).any()):
        raise BadUpdate(f"{name!r} must be whole numbers of at least 0")
    return found.tolist()


def clients_in(tensors: Tensors, name: str) -> list[int]:
    """The clients called ``name``, each once and in order.

    Raises:
        BadUpdate: they are not there, or others.
    """
    found = numbers_in(tensors, name)
    if found != sorted(set(found)):
        raise BadUpdate(f"{name!r} must name clients in order, each once")
    return found


def of_bytes(name: str, rows: NDArray[np.uint8]) -> dict[str, torch.Tensor]:
    """Bytes to be sent."""
    return {MARK + name: torch.from_numpy(rows)}


def of_texts(name: str, texts: Sequence[bytes]) -> dict[str, torch.Tensor]:
    """Texts to be sent."""
    return of_bytes(name, flat(b"".join(texts))) | of_numbers(f"{name}-sizes", [len(text) for text in texts])


def of_numbers(name: str, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
    """Numbers to be sent."""
    return {MARK + name: torch.tensor(numbers, dtype=torch.int64)}


def flat(text: bytes) -> NDArray[np.uint8]:
    """A text as an array: ``[bytes]``."""
    return np.frombuffer(text, np.uint8).copy()


def table(rows: Sequence[bytes], width: int) -> NDArray[np.uint8]:
    """Texts of one length as an array: ``[rows, width]``."""
    return np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), width).copy()
