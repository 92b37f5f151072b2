"""SecureFL: Hao, Li, Xu, Chen, Zhang 2021, Efficient, Private and Robust Federated Learning, ACSAC 2021.

FLTrust on uploads that nobody sees. Clients send directions, so that a cosine is a product with the server's own update
from rows that it trusts, which is linear and can be worked out on shares. That a client sent a direction and nothing
longer is shown by the product of its vector with itself.

Who is trusted: of the server, the client who holds the other shares of a round and the one who deals the squares no two
work together, and the three keep to the protocol; a hostile one of them can spoil the round, and ends it by going.

Differences from the paper, of which abstract and reports were at hand and not the text:
- Its two servers are here the server and a client of the round, another one each time, as there is but one server.
- Products of shares are made by squares that a third client deals (Beaver 1991), where the paper's servers make theirs
  by homomorphic encryption, packed.
- Before, sums over random subsets of coordinates bound each vector, as in a ring a long one can have the square of a
  short one. The server sees these sums, 64 of each vector in a round.
- Who is how much trusted is known to the server and to the holder, and no comparison is done on shares; the paper hides
  it. No sum of fewer than three clients who are trusted is opened.
- The server's rows are the run's public rows, so its own update is no secret from the holder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedfm.core.method import Method, Paper
from fedfm.core.traits import Trait, Traits
from fedfm.core.update import Kind, Member, Tensors
from fedfm.errors import Incompatible, require
from fedfm.secure.gather import Gathering
from fedfm.secure.judges import Judges
from fedfm.secure.judging import Judging
from fedfm.secure.letters import CHECK, DEAL, HOLD, KEYS, OPEN, SQUARE
from fedfm.secure.secure import Secure
from fedfm.secure.unit_point import UnitPoint
from fedfm.wire.stage import Setting, Stage

if TYPE_CHECKING:
    from fedfm.server import RoundServer


@dataclass(frozen=True)
class SecureFL(Secure):
    """$\\Delta = \\lVert g_0 \\rVert \\sum_k T_k u_k / \\sum_k T_k$ with $T_k = \\max(0, u_k \\cdot g_0 / \\lVert g_0
    \\rVert)$, $u_k = \\Delta_k / \\lVert \\Delta_k \\rVert$ and the server's own update $g_0$.

    Args:
        bits: of a value with its sign.
        max_value: 1, as no value of a vector of length 1 is above it.
        max_weight: steps of trust: $T_k$ is rounded to such a part.
        threshold: part of the clients of a round of whom more must send a direction.
    """

    paper: ClassVar[Paper | None] = Paper(
        title="Efficient, Private and Robust Federated Learning",
        authors="Hao, Li, Xu, Chen, Zhang",
        year=2021,
        venue="ACSAC",
    )
    id: ClassVar[str] = "securefl"
    phases: ClassVar[tuple[str, ...]] = (KEYS, DEAL, HOLD, SQUARE, CHECK, OPEN)
    kinds: ClassVar[frozenset[Kind]] = frozenset({Kind.DELTA})
    needs: ClassVar[Traits] = Secure.needs | {Trait.FORGETFUL, Trait.ONE_FIT, Trait.GLOBAL}
    breaks: ClassVar[Traits] = Secure.breaks | {Trait.UNIFORM, Trait.BOUNDED}
    public: ClassVar[bool] = True
    tells: ClassVar[str] = "of each upload its trust, and 64 sums of its numbers; all, too, if it works with the dealer"
    resists: ClassVar[bool] = True
    holders: ClassVar[int] = 1

    bits: int = 21
    max_weight: int = 32768
    threshold: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "max_value", self.max_value == 1, "1")
        require(self, "bits", self.bits <= 21, "at most 21, for products to have room")
        require(self, "max_weight", self.max_weight <= 32768, "at most 32768, for sums to have room")
        require(self, "threshold", 0.5 <= self.threshold < 1, "at least 0.5 and below 1")

    @property
    def fixed_point(self) -> UnitPoint:
        return UnitPoint(self.bits, self.max_value, self.max_weight)

    def parties(self, stages: Sequence[Stage] = ()) -> Judges:
        return Judges(self, stages)

    def gathering(self, server: RoundServer, phase: str, messages: Mapping[Member, Tensors], round: int) -> Gathering:
        return Judging(self, server, phase, messages, round)

    def fits(self, method: Method, setting: Setting) -> None:
        super().fits(method, setting)
        for stage in reversed(setting.stages):
            if stage.secret or type(stage).release is not Stage.release:
                raise Incompatible(
                    f"SecureFL lets a client count by what the others sent, and no epsilon of {type(stage).__name__} "
                    f"counts that. Use secure: secagg, whose sum has noise, or leave {type(stage).__name__} out."
                )
