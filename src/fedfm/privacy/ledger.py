"""What a run spends of privacy, and on whom: read off its sampler, weights, stages and rounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedfm.privacy.dp_sgd import DPSGD
from fedfm.wire.gaussian import Gaussian
from fedfm.wire.stage import Stage

if TYPE_CHECKING:
    from fedfm.federation import Federation


def spent(federation: Federation, rounds: int) -> dict[str, dict[str, float]]:
    """``epsilon`` and ``delta`` after so many rounds with which ``noise_multiplier``, by whom they protect: ``clients``
    or single ``examples``."""
    found: dict[str, dict[str, float]] = {}
    plan = federation.plan
    for stage in federation.stages:
        if isinstance(stage, Gaussian):
            epsilon = stage.epsilon(plan.sampler, len(federation.places), rounds) if rounds else 0.0
            found["clients"] = _entry(stage, epsilon)
    if own := federation.privacy:
        members = map(plan.members.member, federation.ids)
        found["examples"] = _entry(own, own.epsilon(plan.training, members, rounds))
    return found


def budgets(stages: Sequence[Stage], privacy: DPSGD | None) -> dict[str, float]:
    """The most that may be spent, by whom it protects; nothing where there is no bound."""
    most = {
        "clients": max((stage.max_epsilon for stage in stages if isinstance(stage, Gaussian)), default=0.0),
        "examples": privacy.max_epsilon if privacy else 0.0,
    }
    return {who: bound for who, bound in most.items() if bound}


def _entry(part: Gaussian | DPSGD, epsilon: float) -> dict[str, float]:
    return {"epsilon": epsilon, "delta": part.delta, "noise_multiplier": part.noise_multiplier}
