"""Numbers as integers that can be added up in a ring: what is summed is exact, and cannot overflow.

A client with weight $w$, values $x$ and bits $b$ contributes the vector $(w q(x_1), ..., w q(x_d), \\pm 1, ..., w, c)$
with

$$q(x) = \\operatorname{trunc}(\\operatorname{clamp}(x, -M, M) / s), \\quad s = M / L, \\quad L = 2^{b-1} - 1$$

for $M$ the largest value, $b$ the bits of a value and $c$ the number of values that were clamped. So the server gets
$\\sum_k w_k q(x_k)$ and $\\sum_k w_k$ and no single weight. Each coordinate of a client is at most $L W$ in size, with
$W$ the largest weight, and that of a sum over n clients at most $n L W$: with a modulus above $2 n L W$ it is the sum
of the integers itself.

Bits are what stages send beside the upload, each a half or minus a half: they are summed as 1 and -1, without the
weight, and halved in the sum.

Rounding is towards zero, and nothing is drawn: no coordinate grows, so a norm bound that held of the upload holds of
what is summed, too. The price is a bias towards zero of less than $s$ in each coordinate of the mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from fedfm.core import trees
from fedfm.core.update import Kind, Tensors, Update
from fedfm.errors import BadUpdate

Vector = NDArray[np.unsignedinteger]
BESIDE = 2
"""Coordinates behind all others: the weight, and how many values were clamped."""


@dataclass(frozen=True)
class Ring:
    """Integers modulo $2^{8 B}$.

    Args:
        width: $B$, bytes of a number on the wire, from 1 to 8. In memory it has 4 or 8.
    """

    width: int

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """Of a number in memory. Arithmetic modulo its size is also right modulo the ring's."""
        return np.dtype("<u4" if self.width <= 4 else "<u8")

    def zeros(self, length: int) -> Vector:
        """A vector of zeros."""
        return np.zeros(length, self.dtype)

    def pack(self, vector: Vector) -> NDArray[np.uint8]:
        """The bytes of a vector: ``[d, width]``."""
        own = vector.view(np.uint8).reshape(len(vector), vector.itemsize)
        return np.ascontiguousarray(own[:, : self.width])

    def unpack(self, packed: NDArray[np.uint8]) -> Vector:
        """The vector whose bytes these are."""
        whole = np.zeros((len(packed), self.dtype.itemsize), np.uint8)
        whole[:, : self.width] = packed
        return whole.view(self.dtype).reshape(-1)

    def signed(self, vector: Vector) -> NDArray[np.int64]:
        """The numbers of smallest size that are the same in the ring: ``[d]``, int64."""
        whole = np.zeros((len(vector), 8), np.uint8)
        whole[:, : self.width] = self.pack(vector)
        far = np.int64(64 - 8 * self.width)
        return (whole.view("<i8").reshape(-1) << far) >> far


@dataclass(frozen=True)
class FixedPoint:
    """How values become integers.

    Args:
        bits: $b$, of a value with its sign.
        max_value: $M$; larger values are clamped.
        max_weight: $W$; a client with a larger weight takes no part.
        beside: names of the bits that stages send beside the values.
    """

    bits: int
    max_value: float
    max_weight: int
    beside: tuple[str, ...] = field(default=(), kw_only=True)

    @property
    def levels(self) -> int:
        """$L$: the largest integer that a value becomes."""
        return 2 ** (self.bits - 1) - 1

    @property
    def step(self) -> float:
        """$s$: what one of the integers stands for."""
        return self.max_value / self.levels

    def width(self, clients: int) -> int:
        """Bytes of a number in the smallest ring in which a sum over so many clients cannot overflow."""
        return -(-(2 * self.largest(clients)).bit_length() // 8)

    def largest(self, clients: int) -> int:
        """The largest size of a coordinate of a sum over so many clients."""
        return self.reach(clients * self.max_weight)

    def reach(self, weight: int) -> int:
        """The largest size of a coordinate of a sum with so large a sum of weights."""
        return weight * self.levels

    def length(self, values: Mapping[str, torch.Tensor]) -> int:
        """Coordinates of a client's vector.

        Args:
            values: its tensors without bits, or others of their shapes.
        """
        return trees.count(values) + len(self.beside) + BESIDE

    def ring(self, clients: int) -> Ring:
        """The smallest ring in which a sum over so many clients cannot overflow."""
        return Ring(self.width(clients))

    def encode(self, update: Update, ring: Ring) -> Vector:
        """A client's vector: ``[d + bits + 2]``, tensors in the order of their names.

        Raises:
            BadUpdate: a value is not finite or no floating-point number, a bit is none, or the weight is none that can
                be summed.
        """
        weight = int(update.weight)
        if weight != update.weight or not 1 <= weight <= self.max_weight:
            raise BadUpdate(
                f"its weight {update.weight:g} is no whole number from 1 to the {self.max_weight} of max_weight: raise "
                "that, or put Clip into stages, which gives all clients weight 1"
            )
        bits = [_bit(update.tensors, name) for name in self.beside]
        values_of = {name: tensor for name, tensor in update.tensors.items() if name not in self.beside}
        vector = ring.zeros(self.length(values_of))
        at = clamped = 0
        for name, tensor in sorted(values_of.items()):
            if not tensor.is_floating_point():
                raise BadUpdate(f"tensor {name!r} holds {tensor.dtype}, not floating-point numbers")
            values = tensor.detach().to("cpu", torch.float64).numpy().reshape(-1)
            if not np.isfinite(values).all():
                raise BadUpdate(f"tensor {name!r} is not finite")
            clamped += int((np.abs(values) > self.max_value).sum())
            # By M first, so that M itself is the highest level also where the step is rounded.
            levels = np.trunc(values / self.max_value * self.levels).clip(-self.levels, self.levels)
            whole = levels.astype(np.int64) * weight
            vector[at : at + len(whole)] = whole.astype(ring.dtype)
            at += len(whole)
        vector[at:] = np.array([*bits, weight, min(clamped, self.levels * self.max_weight)]).astype(ring.dtype)
        return vector

    def quorum(self, clients: int) -> int:
        """Of so many clients of a round, how many must be in a sum for it to be seen, beside what masks ask for."""
        return 0

    def blur(self, vector: Vector, clients: int, draw: np.random.Generator) -> None:
        """Add a client's part of the noise to its vector, in place. Here there is none.

        Args:
            vector: as :meth:`encode` gave it.
            clients: how many there are in the round.
            draw: random numbers that nobody else knows.
        """

    def fits(self, clients: int) -> None:
        """See that sums over up to so many clients are what they should be.

        Raises:
            RecipeError: they are not.
        """

    def decode(self, total: NDArray[np.int64], clients: int, like: Tensors, kind: Kind) -> tuple[Update, int]:
        """The weighted mean of clients' values with the sum of their weights, and how many values were clamped.

        Args:
            total: the sum of their vectors: ``[d + bits + 2]``.
            clients: how many.
            like: names, shapes and types that the tensors have.
            kind: what they are.

        Raises:
            BadUpdate: it is no sum of such vectors.
        """
        values, (weight, clamped) = total[: -BESIDE - len(self.beside)], total[-BESIDE:].tolist()
        allowed = clients <= weight <= clients * self.max_weight
        if not allowed or clamped < 0 or (np.abs(values) > self.reach(weight)).any():
            raise BadUpdate("the sum is none of what clients send: one of them sent something else")
        tensors: dict[str, torch.Tensor] = {}
        at = 0
        for name, tensor in sorted(like.items()):
            part = values[at : at + tensor.numel()].astype(np.float64) * (self.step / weight)
            tensors[name] = torch.from_numpy(part).reshape(tensor.shape).to(tensor.dtype)
            at += tensor.numel()
        # In the order in which they were sent: norms add up in it, and runs are to be equal to the bit.
        return Update({name: tensors[name] for name in like}, float(weight), kind=kind, member="sum"), clamped

    def counted(self, total: NDArray[np.int64], clients: int) -> dict[str, torch.Tensor]:
        """The sum of each bit over clients, as a number of halves.

        Args:
            total: the sum of their vectors: ``[d + bits + 2]``.
            clients: how many.

        Raises:
            BadUpdate: it is no sum of so many bits.
        """
        sums = total[len(total) - BESIDE - len(self.beside) : -BESIDE].tolist()
        for name, one in zip(self.beside, sums, strict=True):
            if abs(one) > clients or (clients - one) % 2:
                raise BadUpdate(f"the sum of {name!r} is none of {clients} halves: a client sent something else")
        return {name: torch.tensor(one / 2, dtype=torch.float64) for name, one in zip(self.beside, sums, strict=True)}


def above(part: float, count: int) -> int:
    """The least whole number above a part of a number."""
    return math.floor(part * count) + 1


def _bit(tensors: Tensors, name: str) -> int:
    """What a bit is summed as: 1 or -1."""
    found = tensors.get(name)
    if found is None or found.numel() != 1 or abs(float(found)) != 0.5:
        raise BadUpdate(f"the number {name!r} beside its upload is neither a half nor minus a half")
    return 1 if float(found) > 0 else -1
