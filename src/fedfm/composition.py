"""Which parts go with which method: checked when a federation is built, and shown as a matrix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fedfm.core import traits
from fedfm.core.mean import WeightedMean
from fedfm.core.method import Method
from fedfm.core.plan import Sampler
from fedfm.core.traits import Part, Trait
from fedfm.errors import Incompatible, RecipeError
from fedfm.wire.stage import Setting

NOTHING: dict[str, Any] = {
    "stages": (),
    "secure": None,
    "screens": (),
    "audits": (),
    "mean": None,
    "rule": None,
    "schedule": None,
    "privacy": None,
    "threat": None,
    "watermark": None,
}
"""The arguments of a federation that hold parts which a method may bring, too."""


def composed(method: Method, given: Mapping[str, Any]) -> dict[str, Any]:
    """The parts that a user gave together with those that the method brings.

    The method's stages come first, but those that pack tensors last: nothing can work on what they send.

    Raises:
        RecipeError: both name one of a sort of which there can be but one.
    """
    out = dict(given)
    for name, part in method.parts().items():
        if name == "stages":
            packing = tuple(stage for stage in part if stage.packs)
            out[name] = (*(stage for stage in part if not stage.packs), *given[name], *packing)
        elif isinstance(given[name], tuple):
            out[name] = (*part, *given[name])
        elif given[name] is None:
            out[name] = part
        else:
            raise RecipeError(
                f"{method.id} brings its own {name} ({type(part).__name__}), so {type(given[name]).__name__} cannot be "
                f"its {name}. Leave {name} out, or choose another method."
            )
    return out


def check(method: Method, parts: Mapping[str, Any], setting: Setting) -> list[traits.Link]:
    """How a method and parts compose, line by line.

    Args:
        method: the method.
        parts: by the argument of a federation that they go to, as :func:`composed` gives them.
        setting: what stages may look at.

    Raises:
        Incompatible: they do not compose; names both, the trait and what to do instead.
        RecipeError: a stage, or secure aggregation, cannot work in this setting.
    """
    who = type(method).__name__
    for stage in parts["stages"]:
        for phase in method.phases:
            if (kind := method.kind(phase)) not in stage.kinds:
                what = " and ".join(sorted(stage.kinds))
                raise Incompatible(
                    f"{type(stage).__name__} works on {what}, but {who} sends {kind} in its task {phase!r}. "
                    f"Leave {type(stage).__name__} out."
                )
        if stage.summed and not (parts["secure"] and parts["secure"].blurs):
            raise Incompatible(
                f"{type(stage).__name__} adds but a part of the noise to each upload, which protects their sum alone, "
                f"so clients of {who} must see to it that nothing else is seen. Set secure to secagg or secagg-plus, "
                "or choose local-gaussian or gaussian."
            )
    for screen in parts["screens"]:
        if (kind := method.kind(method.phases[-1])) not in screen.kinds:
            what = " and ".join(sorted(screen.kinds))
            raise Incompatible(
                f"{type(screen).__name__} works on {what}, but {who} sends {kind}. Leave {type(screen).__name__} out."
            )
        if screen.simulated_only and (privacy := parts["privacy"]):
            raise Incompatible(
                f"{type(screen).__name__} looks at training rows of clients, which {type(privacy).__name__} protects. "
                f"Leave {type(screen).__name__} out."
            )
    if (threat := parts["threat"]) and threat.forges and (kind := method.kind(method.phases[-1])) not in threat.kinds:
        what = " and ".join(sorted(threat.kinds))
        raise Incompatible(
            f"{type(threat).__name__} forges uploads that are {what}, but {who} sends {kind}. Choose a threat that "
            "poisons rows, such as label-flip."
        )
    order = [
        threat,
        parts["watermark"],
        parts["privacy"],
        *parts["stages"],
        parts["secure"],
        *parts["audits"],
        *parts["screens"],
        parts["mean"],
        parts["rule"],
        parts["schedule"],
    ]
    walked = traits.check(method, [part for part in (setting.sampler, *order) if isinstance(part, Part)])
    if parts["schedule"] is not None:
        parts["schedule"].fits(method, parts["screens"])
    if parts["watermark"] is not None:
        parts["watermark"].fits(method, parts["schedule"])
    if parts["privacy"] is not None:
        parts["privacy"].fits(parts["schedule"])
    for stage in parts["stages"]:
        stage.fits(setting)
    if parts["secure"] is not None:
        parts["secure"].fits(method, setting)
        if parts["privacy"] is not None and Trait.ONE_FIT in parts["secure"].breaks:
            # Privacy stands before it in the walk, but protects the rows from all that looks at them.
            raise Incompatible(
                f"{type(parts['privacy']).__name__} needs {Trait.ONE_FIT.name} ({Trait.ONE_FIT.value}), which "
                f"{type(parts['secure']).__name__} takes away. Choose another kind of secure, such as ckks."
            )
    return walked


def protecting(method: Method, parts: Mapping[str, Any]) -> dict[str, list[str]]:
    """Which parts protect, by what they do, whoever brought them; a part of a method's own has the method's name.

    Args:
        method: the method.
        parts: as of :func:`check`.

    Returns:
        ``sums``: single uploads are hidden, of which something may be told all the same (``tells``); ``noise``: clients
        add noise to each upload, or to their ``summed`` ones alone; ``resists``: what one client can do is bounded,
        by stages, screens, the mean and sums.
    """

    def names(some: Iterable[Any]) -> list[str]:
        return [part.id if hasattr(part, "id") else method.id for part in some]

    stages, secure = parts["stages"], [parts["secure"]] if parts["secure"] else []
    bounds = (stage for stage in stages if Trait.BOUNDED in stage.gives)
    mean = parts["mean"]
    robust = () if mean is None or type(mean) is WeightedMean else (mean,)
    return {
        "sums": names(secure),
        "tells": [one.tells for one in secure if one.tells],
        "noise": names(stage for stage in stages if stage.secret and not stage.summed),
        "summed": names(stage for stage in stages if stage.summed),
        "resists": names((*(one for one in secure if one.resists), *parts["screens"], *robust, *bounds)),
    }


def refusal(method: Method, parts: Mapping[str, Any], sampler: Sampler, clients: int = 1000) -> str:
    """Why a part cannot go with a method; empty if it can.

    Args:
        method: by whatever settings.
        parts: the part, and others that it cannot do without, by the argument of a federation that they go to.
        sampler: how participants are drawn.
        clients: how many there are.
    """
    try:
        found = composed(method, {**NOTHING, **parts})
        check(method, found, Setting(found["stages"], sampler, clients))
    except (Incompatible, RecipeError) as error:
        return str(error)
    return ""
