"""FedML-HE: Jin et al. 2023, FedML-HE: An Efficient Homomorphic-Encryption-Based Privacy-Preserving Federated Learning
System (arXiv 2303.10837).

Only what tells most of a client's data is encrypted. Before the first training clients find out how sensitive each
coordinate is, the maps are summed under encryption, and the most sensitive part of the coordinates is encrypted from
then on; the others are seen by the server, as is the client's weight.

Who is trusted: as with `ckks`; and that what is not encrypted tells little, for which there is no proof.

Differences from the paper:
- Sensitivity is taken at the weights after a client's own training, not before: LoRA begins with B = 0, and all of A
  would have none. Of the derivative by the label, only the entry of the true class is taken; see
  :mod:`fedfm.secure.sensitivity`.
- Each client's map has its largest value at 1 before it is weighed, as integers are encrypted.
- The server learns the mask alone and not the summed map, which the clients open.
- Who draws the map are the clients of the first round, not all.
- The plain part has no noise; the paper leaves that open.
- Keys and integers are those of `ckks`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from fedfm.core.jobs import Job
from fedfm.core.method import Client, Method, Paper
from fedfm.core.traits import Trait, Traits
from fedfm.core.update import Member, Tensors
from fedfm.errors import BadUpdate, Incompatible, require
from fedfm.secure.ckks import CKKS
from fedfm.secure.gather import Gathering
from fedfm.secure.letters import CHOOSE, DEAL, KEYS, MAP, OPEN
from fedfm.secure.selecting import Selecting
from fedfm.secure.selector import Selectors
from fedfm.secure.sensitivity import Sensitivity
from fedfm.wire.stage import Setting, Stage

if TYPE_CHECKING:
    from fedfm.secure.secure import Study
    from fedfm.server import RoundServer


@dataclass(frozen=True)
class FedMLHE(CKKS):
    """As :class:`fedfm.secure.ckks.CKKS`, for the most sensitive coordinates alone.

    Args:
        ratio: $p$, part of the coordinates that is encrypted, rounded up; the paper's experiments have 0.1 and 0.3.
        examples: training rows of a client out of which sensitivity is found.
    """

    paper: ClassVar[Paper | None] = Paper(
        title="FedML-HE: An Efficient Homomorphic-Encryption-Based Privacy-Preserving Federated Learning System",
        authors="Jin, Yao, Han, Gu, Joe-Wong, Ravi, Avestimehr, He",
        year=2023,
        arxiv="2303.10837",
    )
    id: ClassVar[str] = "fedml-he"
    phases: ClassVar[tuple[str, ...]] = (KEYS, DEAL, MAP, CHOOSE, OPEN)
    # What is sensitive is found once.
    needs: ClassVar[Traits] = CKKS.needs | {Trait.STEADY}
    instead: ClassVar[dict[Trait, str]] = {
        **CKKS.instead,
        Trait.STEADY: "Use secure: ckks, which encrypts everything, or a method that sends the same tensors in each "
        "round, such as fedavg or fedit.",
    }
    # Before the first round clients train once more, for the map.
    breaks: ClassVar[Traits] = CKKS.breaks | {Trait.ONE_FIT}

    ratio: float = 0.1
    examples: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "ratio", 0 < self.ratio <= 1, "above 0, as nothing would be encrypted, and at most 1")
        require(self, "examples", self.examples >= 1, "at least 1")

    def parties(self, stages: Sequence[Stage] = ()) -> Selectors:
        return Selectors(self, stages)

    def gathering(self, server: RoundServer, phase: str, messages: Mapping[Member, Tensors], round: int) -> Gathering:
        return Selecting(self, server, phase, messages, round)

    def study(self, phase: str, method: Method) -> Study | None:
        return partial(self._sensitivity, method) if phase == MAP else None

    def _sensitivity(self, method: Method, client: Client, message: Tensors) -> Job:
        if (like := method.expects(method.phases[-1], message)) is None:
            raise BadUpdate(f"{type(method).__name__} does not say which tensors it uploads in answer to this message")
        return Sensitivity(method.compose(client, message), train=method.train, like=like, examples=self.examples)

    def fits(self, method: Method, setting: Setting) -> None:
        super().fits(method, setting)
        for stage in reversed(setting.stages):  # What adds noise stands behind what moves a bound by it.
            if stage.secret or type(stage).release is not Stage.release:
                raise Incompatible(
                    f"{type(self).__name__} chooses by clients' rows what is encrypted, and no epsilon of "
                    f"{type(stage).__name__} counts that choice. Use secure: ckks, which encrypts everything, or leave "
                    f"{type(stage).__name__} out."
                )
