"""The contract of an inference attack: what it looks at, and what it tries to learn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal

from fedfm.audit.finding import Finding
from fedfm.core.traits import Part

if TYPE_CHECKING:
    from fedfm.audit.case import Case

Aim = Literal["membership", "reconstruction", "extraction", "attribute", "property"]
Sees = Literal["model", "uploads", "dispatch"]
"""What an attacker has: the ``model`` after training, as everybody who gets it; the ``uploads`` of a round as the
server reads them; or ``dispatch``, where the server also changes what it hands out."""


class Inference(Part, ABC):
    """Subclasses are frozen dataclasses. One looks at nothing of a case but what ``sees`` says, and at the rows only to
    count how often it was right."""

    id: ClassVar[str]
    aim: ClassVar[Aim]
    sees: ClassVar[Sees]
    tasks: ClassVar[tuple[str, ...]] = ()
    """Ids of the tasks it is for; empty means any."""
    trains: ClassVar[bool] = False
    """Whether it trains models of its own, or searches for rows, so that it may take as long as several runs."""

    def refusal(self, case: Case) -> str:
        """Why it cannot be carried out here; nothing if it can."""
        if self.tasks and case.federation.task.id not in self.tasks:
            return f"it is for the task {' or '.join(self.tasks)}, not for {case.federation.task.id}"
        if self.sees == "model" and not case.tensors:
            return f"{case.federation.method.id} makes no global model"
        return ""

    @abstractmethod
    def look(self, case: Case) -> tuple[Finding, ...]:
        """Carry it out."""
