"""Additive secret sharing: Knott et al. 2021, CrypTen: Secure Multi-Party Computation Meets Machine Learning, NeurIPS
2021 (arXiv 2109.00984).

A vector is split into random shares that add up to it, one for each of several parties. Each adds up the shares that it
has, and only these sums are put together. Here the parties are the server and some clients of the round, others each
time, as there is but one server.

Who is trusted: that the server works with fewer than all holders of a round. In turn each of them is needed: where one
is gone, the round ends. A client does as much whatever the number of clients, where `secagg` has a mask for each.

Differences from the paper, which is about computing with shares, and sums are the part of it that is needed here:
- The share of a holder is drawn from a seed (AES-256 in counter mode), which is all that is sent, sealed (X25519,
  ChaCha20-Poly1305). So one vector goes up from a client, and one more from a holder. In the paper pairs of parties
  have seeds in common, out of which shares of zero are drawn.
- The ring is the smallest with room for the sum, and not that of 64 bits; rounding is that of
  :mod:`fedfm.secure.fixed_point`.
- The stage ``distributed-gaussian`` lets clients add noise to the integers before they split them. Mugunthan et al.
  2019 (SMPAI) have a part of Laplace noise from each; here it is Gaussian, for which there is an account.
- Holders say whom they cannot open before anybody trains, so that one bad letter does not end the round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedfm.core.method import Method, Paper
from fedfm.core.update import Member, Tensors
from fedfm.errors import RecipeError, require
from fedfm.secure.blurred import Blurred
from fedfm.secure.gather import Gathering
from fedfm.secure.letters import DEAL, HOLD, KEYS, OPEN
from fedfm.secure.sharers import Sharers
from fedfm.secure.sharing import Sharing
from fedfm.wire.stage import Setting, Stage

if TYPE_CHECKING:
    from fedfm.server import RoundServer


@dataclass(frozen=True)
class SMPCAdditive(Blurred):
    """$x_u = (x_u - \\sum_j PRG(s_{uj})) + \\sum_j PRG(s_{uj})$ with the first share for the server and the seed
    $s_{uj}$ for holder j, in integers modulo a power of two. Holder j sends $\\sum_u PRG(s_{uj})$.

    Args:
        threshold: part of the clients of a round of whom more must be in a sum; holders open no other.
        holders: clients who hold shares, beside the server; all of them are needed for the sum.
    """

    paper: ClassVar[Paper | None] = Paper(
        title="CrypTen: Secure Multi-Party Computation Meets Machine Learning",
        authors="Knott, Venkataraman, Hannun, Sengupta, Ibrahim, van der Maaten",
        year=2021,
        venue="NeurIPS",
        arxiv="2109.00984",
    )
    id: ClassVar[str] = "smpc-additive"
    phases: ClassVar[tuple[str, ...]] = (KEYS, DEAL, HOLD, OPEN)

    holders: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "holders", self.holders >= 1, "at least 1")

    def parties(self, stages: Sequence[Stage] = ()) -> Sharers:
        return Sharers(self, stages)

    def gathering(self, server: RoundServer, phase: str, messages: Mapping[Member, Tensors], round: int) -> Gathering:
        return Sharing(self, server, phase, messages, round)

    def fits(self, method: Method, setting: Setting) -> None:
        super().fits(method, setting)
        if setting.expected < self.holders:
            raise RecipeError(
                f"SMPCAdditive has {self.holders} holders of shares, but the sampler draws {setting.expected:g} of "
                f"{setting.population} clients on average. Lower holders, or let more take part."
            )
