"""CKKS: Cheon et al. 2017, Homomorphic Encryption for Arithmetic of Approximate Numbers, ASIACRYPT 2017.

Clients have one key in common and the server has none: it adds ciphertexts up, and clients open the sum.

Who is trusted: that the server works with no client, and passes on and adds up what the protocol says. Every client of
a round has its secret key, so a server that works with one of them can read every upload, where for masks (`secagg`) it
needs more than half of them. In turn nobody's dropping out costs anything.

Differences from the paper, which is about arithmetic and not about federations:
- Integers are encrypted, exactly; see :mod:`fedfm.secure.cipher`. So the mean is that of `secagg`, bit for bit, and
  what the server is told says nothing of the noise, out of which the key could be found.
- A key of its own for each round, made by one of the clients, who seals it for the others (X25519). Systems such as
  FedML-HE and NVFlare hand one key out before the run, for all of it, by a trusted party.
- Encryption with the secret key, as whoever encrypts has it: its noise is 40 times smaller.
- Clients multiply by their weights, so the server need not know them and no multiplication is encrypted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedfm.core.method import Paper
from fedfm.core.update import Member, Tensors
from fedfm.errors import RecipeError, require
from fedfm.secure.cipher import EXACT
from fedfm.secure.fixed_point import FixedPoint
from fedfm.secure.gather import Gathering
from fedfm.secure.holders import Holders
from fedfm.secure.letters import DEAL, KEYS, OPEN
from fedfm.secure.opening import Opening
from fedfm.secure.secure import Secure

if TYPE_CHECKING:
    from fedfm.server import RoundServer
    from fedfm.wire.stage import Stage


@dataclass(frozen=True)
class CKKS(Secure):
    """The server gets $\\sum_k [x_k] = [\\sum_k x_k]$ with $[x]$ the ciphertext of x, in chunks of some thousand
    integers.

    Args:
        max_weight: the largest weight of a client; at 24 bits, up to 1024 clients can be summed with this one.
        openers: clients who open the sum and have to agree on it; if they do not, what most clients say counts. One
            alone could say anything.
    """

    paper: ClassVar[Paper | None] = Paper(
        title="Homomorphic Encryption for Arithmetic of Approximate Numbers",
        authors="Cheon, Kim, Kim, Song",
        year=2017,
        venue="ASIACRYPT",
    )
    id: ClassVar[str] = "ckks"
    phases: ClassVar[tuple[str, ...]] = (KEYS, DEAL, OPEN)

    max_weight: int = 16384
    openers: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "openers", self.openers >= 1, "at least 1")

    def parties(self, stages: Sequence[Stage] = ()) -> Holders:
        return Holders(self, stages)

    def gathering(self, server: RoundServer, phase: str, messages: Mapping[Member, Tensors], round: int) -> Gathering:
        return Opening(self, server, phase, messages, round)

    def see_room(self, clients: int, code: FixedPoint) -> None:
        if (bits := code.largest(clients).bit_length()) > EXACT:
            raise RecipeError(
                f"{type(self).__name__}: a sum over {clients} clients of values of {self.bits} bits with weights up to "
                f"{self.max_weight} takes {bits} bits, more than the {EXACT} that are exact under encryption. Lower "
                "bits or max_weight, or put Clip into stages, which gives all clients weight 1, and set max_weight to "
                "1."
            )
