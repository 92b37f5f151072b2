"""The contract of a stage: something done to every upload, half on the client and half on the server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch

from fedfm.core.traits import Part, Trait
from fedfm.core.update import Kind, Tensors, Update

if TYPE_CHECKING:
    from fedfm.core.plan import Plan, Sampler


@dataclass
class Sender:
    """A client as one stage sees it.

    Args:
        draw: random numbers for this client, round and stage.
        memory: what this stage keeps on this client; empty at first.
        kept: what ``keep`` was given; stored once the update is admitted.
    """

    draw: torch.Generator
    memory: Tensors = field(default_factory=dict)
    kept: Tensors | None = None

    def keep(self, tensors: Tensors) -> None:
        """Replace what this stage keeps on this client. Takes effect only when the update is admitted."""
        self.kept = dict(tensors)


@dataclass(frozen=True)
class Setting:
    """The federation around a stage.

    Args:
        stages: all stages, in order.
        sampler: how participants are drawn.
        population: number of clients, $N$.
        secret: in a round, the seed of noise, which nobody else may know.
        memory: what stages keep on the server, by their position; empty at first.
        beside: in a round, the sum over its clients of what stages sent beside the uploads, by name.
        kept: what stages gave to ``keep``; takes effect when the round is done.
    """

    stages: Sequence[Stage]
    sampler: Sampler
    population: int
    secret: int = 0
    memory: Mapping[int, Tensors] = field(default_factory=dict)
    beside: Tensors = field(default_factory=dict)
    kept: dict[int, Tensors] = field(default_factory=dict)

    @property
    def expected(self) -> float:
        """Mean number of participants of a round."""
        return self.sampler.expected(self.population)

    def place(self, stage: Stage) -> int:
        """The position of a stage."""
        return next(i for i, one in enumerate(self.stages) if one is stage)

    def recall(self, stage: Stage) -> Tensors:
        """What a stage keeps on the server."""
        return self.memory.get(self.place(stage), {})

    def keep(self, stage: Stage, tensors: Tensors) -> None:
        """Replace what a stage keeps on the server, from the next round on."""
        self.kept[self.place(stage)] = dict(tensors)


class Stage(Part):
    """A step of the upload's way. Subclasses are frozen dataclasses and override what they need.

    Stages run in the order of the recipe on the client, and in the opposite order on the server.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({Kind.DELTA, Kind.WEIGHTS})
    """The kinds of upload it can work on."""
    packs: ClassVar[bool] = False
    """Whether it puts tensors into another form, so that it comes after stages that do not."""
    beside: ClassVar[tuple[str, ...]] = ()
    """Names of bits that ``send`` adds to an upload, each a half or minus a half; the server adds them up for
    ``release`` and for nobody else, and secure aggregation does so unseen."""
    secret: ClassVar[bool] = False
    """Whether nobody else may know what it draws, as the noise that it adds; else all follows from the run's seed."""
    summed: ClassVar[bool] = False
    """Whether it protects sums alone, so that it needs secure aggregation, which lets nothing else be seen."""

    guards: ClassVar[bool] = False
    """Whether it is there to protect what uploads tell of rows, by a bound or by noise."""

    def at(self, memory: Tensors) -> Self:
        """The stage as it is in a round.

        Args:
            memory: what it keeps on the server; on a client what ``told`` made of it.
        """
        return self

    def told(self) -> Tensors:
        """What a client must know of the stage in this round; travels with the message."""
        return {}

    def raised(self, noise_multiplier: float, setting: Setting) -> float:
        """The noise multiplier of the mean where this stage spends some of the privacy that is accounted for."""
        return noise_multiplier

    def send(self, update: Update, sender: Sender) -> Update:
        """What leaves the client instead of ``update``."""
        return update

    def receive(self, update: Update, like: Tensors | None) -> Update:
        """What the server works with instead of what arrived.

        Args:
            update: what arrived.
            like: names and shapes that the client's own upload had; ``None`` when the server cannot know them.

        Raises:
            BadUpdate: it is not what this stage sends.
        """
        return update

    def release(self, mean: Update, setting: Setting, draw: torch.Generator) -> Update:
        """What the server works with instead of the mean; its weight is the sum of the uploads' weights.

        A stage that overrides this is also asked when no upload arrived, with zeros of weight 0.
        """
        return mean

    def settled(self, plan: Plan) -> Self:
        """The same stage with those settings worked out that depend on what is run."""
        return self

    def fits(self, setting: Setting) -> None:
        """See, before the run, that it can work in this setting.

        Raises:
            RecipeError: it cannot; says what to change.
        """


def received(stages: Sequence[Stage], update: Update, like: Tensors | None) -> Update:
    """What the server works with instead of what arrived, through all stages in the opposite order.

    A stage that bounds uploads is not asked again where a later one has added noise to them on the client: with its
    noise an upload is far longer than the bound, and cutting it would take away the upload itself. What it says of
    weights still holds.

    Args:
        stages: in the order of the recipe.
        update: what arrived.
        like: as of :meth:`Stage.receive`.

    Raises:
        BadUpdate: it is not what the stages send.
    """
    noisy = False
    for stage in reversed(stages):
        if not (noisy and Trait.BOUNDED in stage.gives):
            update = stage.receive(update, like)
        elif Trait.UNIFORM in stage.gives:
            update = replace(update, weight=1.0)
        noisy = noisy or stage.secret
    return update
