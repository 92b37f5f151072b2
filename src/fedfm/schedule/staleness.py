"""How much an upload counts that started from an older version of the model.

Staleness $u$ is the number of versions that came between the start of a task and the use of its upload. The three
functions are those of Xie et al. 2019 (arXiv 1903.03934); Nguyen et al. 2022 (arXiv 2106.06639) use the polynomial one
with the power 1/2. Each is 1 at $u = 0$ and never rises.
"""

from __future__ import annotations

from typing import Literal

Discount = Literal["constant", "polynomial", "hinge"]


def constant(staleness: int) -> float:
    """$s(u) = 1$.

    >>> constant(7)
    1.0
    """
    return 1.0


def polynomial(staleness: int, power: float) -> float:
    """$s(u) = (1 + u)^{-c}$.

    >>> polynomial(3, 0.5)
    0.5
    """
    return float((1 + staleness) ** -power)


def hinge(staleness: int, slope: float, grace: int) -> float:
    """$s(u) = 1$ if $u \\le b$, else $1 / (a (u - b) + 1)$.

    >>> hinge(4, 10.0, 4), hinge(5, 1.0, 4)
    (1.0, 0.5)
    """
    return 1.0 if staleness <= grace else 1 / (slope * (staleness - grace) + 1)
