"""What must hold of a whole federation, beyond what traits say of its parts (:mod:`fedfm.composition`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedfm import composition
from fedfm.attack.attack import Attack
from fedfm.core import traits
from fedfm.errors import Incompatible, RecipeError
from fedfm.links.inprocess import InProcess
from fedfm.ownership.watermark import Watermark
from fedfm.robust.screen import Screen
from fedfm.schedule.schedule import Schedule
from fedfm.schedule.synchronous import Synchronous

if TYPE_CHECKING:
    from fedfm.federation import Federation
    from fedfm.secure.secure import Secure


def check(one: Federation) -> list[traits.Link]:
    """How the parts of a federation compose, line by line.

    Raises:
        Incompatible: they do not.
        RecipeError: a part lacks the rows that it looks at.
    """
    if one.method.spaces and one.space.id not in one.method.spaces:
        raise Incompatible(
            f"{type(one.method).__name__} is defined on the space {' or '.join(one.method.spaces)}, not on "
            f"{one.space.id}. Set space.kind to {one.method.spaces[0]}, or choose fedavg, which takes any space."
        )
    if one.method.tasks and one.task.id not in one.method.tasks:
        raise Incompatible(
            f"{type(one.method).__name__} is defined on the task {' or '.join(one.method.tasks)}, not on "
            f"{one.task.id}. Set task.kind to {one.method.tasks[0]}, or choose fedavg, which takes any task."
        )
    if one.method.public and not len(one.public):
        raise RecipeError(
            f"{type(one.method).__name__} looks at rows that all have, and there are no public rows. Give the run "
            "some: data.public: 0.05, for one row in twenty; sites of a deployed federation have none in common."
        )
    looking: list[Screen | Schedule | Secure] = [*one.screens, one.schedule, *([one.secure] if one.secure else [])]
    for part in looking:
        if part.public and not len(one.public):
            raise RecipeError(
                f"{type(part).__name__} judges uploads by rows that the server has, and there are no public "
                "rows. Give the run some: data.public: 0.05, for one row in twenty; a deployed federation has none."
            )
    for screen in one.screens:
        screen.fits(one.method, one.space.id)
        if screen.simulated_only and not one.link.simulated:
            raise Incompatible(
                f"{type(screen).__name__} sees what no server of a real federation sees; it runs only in "
                "simulation. Choose a screen that looks at uploads alone, such as geometric-median."
            )
    if one.method.simulated_only and not one.link.simulated:
        raise Incompatible(f"{type(one.method).__name__} sees all clients' data; it runs only in simulation.")
    if one.attack:
        _check_attack(one, one.attack)
    parts = {name: getattr(one, name) for name in composition.NOTHING}
    walked = composition.check(one.method, parts, one.setting)
    if one.watermark:
        _check_watermark(one, one.watermark)
    return walked


def _in_one_process(one: Federation) -> bool:
    return isinstance(one.link, type) and issubclass(one.link, InProcess)


def _check_attack(one: Federation, attack: Attack) -> None:
    """See that a threat can be carried out here.

    Raises:
        Incompatible: it cannot.
    """
    threat, who = attack.threat, type(attack.threat).__name__
    if not _in_one_process(one):
        raise Incompatible(
            f"{who} is for simulations in one process, but clients are reached by {one.link.__name__}. Leave "
            "threat out: no real client is made hostile."
        )
    if threat.tasks and one.task.id not in threat.tasks:
        raise Incompatible(
            f"{who} poisons rows of the task {' or '.join(threat.tasks)}, not of {one.task.id}. Choose a threat "
            "that changes uploads, such as sign-flip."
        )
    if threat.knowledge != "local" and not isinstance(one.schedule, Synchronous):
        raise Incompatible(
            f"{who} looks at the uploads of a whole round, but {type(one.schedule).__name__} takes them one by "
            "one. Choose a threat that looks at its own upload only, such as sign-flip."
        )
    if lost := sorted(set(attack.hostile) - set(one.ids)):
        raise Incompatible(
            f"{who} makes {lost[0]!r} hostile, which is no client of {type(one.method).__name__}: that changes "
            "who takes part. Choose another method."
        )


def _check_watermark(one: Federation, watermark: Watermark) -> None:
    """See that a watermark can be had here.

    Raises:
        Incompatible: it cannot.
    """
    who = type(watermark).__name__
    for what, own, allowed in (
        ("task", one.task.id, watermark.tasks),
        ("space", one.space.id, watermark.spaces),
    ):
        if allowed and own not in allowed:
            raise Incompatible(f"{who} is for the {what} {' or '.join(allowed)}, not for {own}. Leave it out.")
    if watermark.in_clients and not _in_one_process(one):
        raise Incompatible(
            f"{who} needs clients who keep keys of their own, which only a simulation in one process has. Take the "
            "watermark waffle, for which clients do nothing."
        )
