"""The server's side of one round: asking, admitting, dropping, noting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fedfm.core import trees
from fedfm.core.method import Mean, Rule
from fedfm.core.traits import Trait
from fedfm.core.update import Kind, Member, Tensors, Update
from fedfm.errors import BadUpdate
from fedfm.links.link import Link
from fedfm.wire.admit import admit

if TYPE_CHECKING:
    from fedfm.federation import Federation


@dataclass
class RoundServer:
    """What a round sees of the federation, and what it notes of it."""

    federation: Federation
    link: Link
    round: int
    members: tuple[Member, ...]
    dropped: list[dict[str, str]] = field(default_factory=list)
    took_part: dict[str, dict[str, float]] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0

    @property
    def mean(self) -> Mean:
        return self.federation.mean

    @property
    def rule(self) -> Rule:
        return self.federation.rule

    def ask(self, phase: str, messages: Mapping[Member, Tensors]) -> Iterator[Update]:
        """The admitted updates in the order of client ids; who fails is dropped and named."""
        method = self.federation.method
        if phase not in method.phases:
            raise ValueError(f"{type(method).__name__} has no task {phase!r}, only {', '.join(method.phases)}")
        aligned = Trait.ALIGNED in method.traits and method.sends is not Kind.KNOWLEDGE
        expected = trees.select(self.federation.bench.space.initial, method.share) if aligned else None
        for reply in self.link.ask(phase, self.round, messages):
            self.bytes_down += reply.bytes_down
            self.bytes_up += reply.bytes_up
            update = reply.update
            try:
                if update is None:
                    raise BadUpdate(reply.reason)
                for stage in reversed(self.federation.stages):
                    update = stage.receive(update)
                admit(update, method.sends, expected, self.federation.limits)
            except BadUpdate as error:
                self.dropped.append({"client": reply.member.id, "reason": str(error)})
                continue
            reply.accept()
            self.took_part[reply.member.id] = {
                **update.metrics,
                "seconds": round(reply.seconds, 3),
                "steps": reply.steps,
                "bytes_up": reply.bytes_up,
                "weight": update.weight,
            }
            yield update
            # Held no longer than the receiver holds it: the next update may need the memory.
            del reply, update

    def record(self) -> dict[str, Any]:
        """The round as a line of ``metrics.jsonl``."""
        losses = [(c["loss"], c["weight"]) for c in self.took_part.values() if "loss" in c]
        weight = sum(w for _, w in losses)
        return {
            "round": self.round,
            "train_loss": sum(x * w for x, w in losses) / weight if weight else None,
            "participants": self.took_part,
            "dropped": self.dropped,
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
        }
