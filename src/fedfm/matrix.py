"""Attacks against defences: which runs the table needs, and what stands in its cells."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from fedfm import parts
from fedfm.attack.threat import Threat
from fedfm.errors import RecipeError
from fedfm.evaluate.assessment import Assessment
from fedfm.federation import Federation
from fedfm.parts import Spec
from fedfm.privacy.dp_sgd import DPSGD
from fedfm.robust.estimator import Estimator
from fedfm.schedule.schedule import Schedule
from fedfm.wire.stage import Stage

NONE = "none"
"""Name of the row without an attack and of the column without a defence."""
FOLDERS = ("robust", "wire", "privacy", "schedule")
"""Where defences are."""


def name(attack: str, defence: str) -> str:
    """Of the run in a cell.

    >>> name("alie", "krum")
    'alie+krum'
    """
    return f"{attack}+{defence}"


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A table of attacks against defences.

    Args:
        main: the federation without attack and defence.
        attacks: specs of threats.
        defences: specs of screens, estimators, stages, schedules, and what protects examples.

    Raises:
        RecipeError: a part that there is not, or one that is named twice.
        Incompatible: two parts do not compose.
    """

    main: Federation
    attacks: Sequence[Spec]
    defences: Sequence[Spec]

    def threats(self) -> dict[str, Threat]:
        """The attacks by id, in their order."""
        found: dict[str, Threat] = {}
        for position, spec in enumerate(self.attacks):
            one = parts.make("attack", spec, f"attacks.{position}")
            _new(one.id, found, f"attacks.{position}")
            found[one.id] = one
        return found

    def runs(self) -> dict[str, Federation]:
        """The federations by name, row by row; the first is the main one."""
        found, method = {}, self.main.method
        under: dict[str, Federation] = {NONE: self.main}
        under |= {id: self.main.like(method, threat=threat) for id, threat in self.threats().items()}
        counts = {id: len(run.attack.hostile) if run.attack else 0 for id, run in under.items()}
        # Without an attack a defence is what it is with the attack of most clients.
        counts[NONE] = max(counts.values())
        for attack, run in under.items():
            found[name(attack, NONE)] = run
            for defence, (spec, where) in self._columns().items():
                found[name(attack, defence)] = run.like(method, **self._defended(spec, where, counts[attack]))
        return found

    def _columns(self) -> dict[str, tuple[Spec, str]]:
        """By id of a defence, how it was named and where."""
        found: dict[str, tuple[Spec, str]] = {}
        for position, spec in enumerate(self.defences):
            id = spec if isinstance(spec, str) else str(spec.get("kind"))
            _new(id, found, f"defences.{position}")
            found[id] = (spec, f"defences.{position}")
        return found

    def _defended(self, spec: Spec, where: str, hostile: int) -> dict[str, Any]:
        """A defence as an argument of a federation."""
        settings: dict[str, Any] = {"kind": spec} if isinstance(spec, str) else dict(spec)
        kind = str(settings.get("kind"))
        folder = next((f for f in FOLDERS if kind in parts.kinds(f)), FOLDERS[0])
        cls = parts.find(folder, kind, where)
        if "hostile" not in settings and any(f.name == "hostile" for f in dataclasses.fields(cls)):
            settings["hostile"] = hostile
        one = parts.make(folder, settings, where)
        if isinstance(one, Estimator):
            return {"mean": one}
        if isinstance(one, DPSGD):
            return {"privacy": one}
        if isinstance(one, Schedule):
            return {"schedule": one}
        return {"stages" if isinstance(one, Stage) else "screens": (one,)}

    def table(
        self,
        runs: Mapping[str, Federation],
        tests: Mapping[str, Assessment | None],
        success: Mapping[str, float | None],
    ) -> dict[str, Any]:
        """What stands in the cells: how good the mean honest client's model is, and how often the attack succeeds.

        Clients that any of the attacks makes hostile are left out of all cells.

        Args:
            runs: as :meth:`runs` made them.
            tests: by run.
            success: by run; of an attack with an aim.
        """
        hostile = {id for run in runs.values() if run.attack for id in run.attack.hostile}
        scored = next((test for test in tests.values() if test), None)
        metric = "accuracy" if scored and "accuracy" in scored.mean else "loss"
        rows = [NONE, *self.threats()]
        return {
            "attacks": rows,
            "defences": [NONE, *self._columns()],
            "metric": metric,
            "hostile": {row: attack.describe() for row in rows if (attack := runs[name(row, NONE)].attack)},
            "cells": {
                run: {"quality": _quality(tests.get(run), metric, hostile), "attack_success": success.get(run)}
                for run in runs
            },
        }


def _quality(test: Assessment | None, metric: str, without: set[str]) -> float | None:
    scores = [of[metric] for id, of in test.clients.items() if id not in without] if test else []
    return fmean(scores) if scores else None


def _new(id: str, known: Mapping[str, object], where: str) -> None:
    if id in known or id == NONE:
        why = "which is there already" if id in known else "which is always there"
        raise RecipeError(f"{where} names {id!r}, {why}. Leave it out.")
