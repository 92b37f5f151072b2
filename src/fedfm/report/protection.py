"""Who saw what of a run, what that was protected by, and what not.

What was seen is read off the records of the rounds, where a transcript at the link noted what arrived; what protected
it off the ledger and the parts at work, also those that a method brings. Nothing is said to be hidden because a recipe
says that it should be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedfm.report.read import Run
from fedfm.report.tables import Cell, Grid
from fedfm.report.units import amount, figure, plural

SCORES = ("validate", "test", "probe-validate", "probe-test")
"""Tasks that score a model."""
KINDS = {"delta": "changes of weights", "weights": "weights", "knowledge": "values that the method shares"}
NOTHING, NO_TRAVEL = "nothing", "nothing travels"
OPEN = "single rows: fedfm audit measures what can be learnt of them"


def protection(run: Run) -> Grid:
    """A row for each party; no rows where a run has no transcript."""
    if not any(record.get("seen") for record in run.records) or "protecting" not in run.records[0]:
        return Grid([], [])
    head = ["who", "what they see", "protected by", "not protected"]
    rows = [_server(run), _receivers(run), _hostile(run), *_network(run)]
    cells = []
    for who, sees, by, left in rows:
        mood = "bad" if by.startswith(NOTHING) and by != NO_TRAVEL else "" if by == NO_TRAVEL else "good"
        cells.append(
            [Cell(who, side="left"), Cell(sees, side="left"), Cell(by, kind=mood, side="left"), Cell(left, side="left")]
        )
    note = (
        "What was seen was noted where it arrived. A guarantee of ε is for one client or one example at δ; it covers "
        "what all have in common as little as what somebody tells besides."
    )
    return Grid(head, cells, note)


def uploads(run: Run) -> list[Mapping[str, Any]]:
    """What clients sent in tasks of the method, round by round."""
    return [
        {**seen, "task": task}
        for record in run.rounds
        for task, seen in record.get("seen", {}).items()
        if task not in SCORES and not task.startswith("secure/")
    ]


HIDDEN = {
    "masked": "each of them masked",
    "cipher": "each of them encrypted",
    "share": "of each of them one share",
}
"""What a protocol makes of a whole upload."""
COALITIONS = {
    "masked": "all, if the server sends other clients' keys or hands out crafted weights",
    "cipher": "all, if the server works with one client, as clients have the key",
    "share": "all, if the server works with all who hold the other shares",
}


def hidden(seen: Mapping[str, Any]) -> str:
    """By which name the whole of an upload was sealed; nothing where any of it could be read."""
    names = set(seen["sealed"]) - {"cipher-sizes"}
    [name] = names if len(names) == 1 else [""]
    whole = not {*seen["types"]} - {"uint8", "int64"} and seen["weights"] == [0, 0]
    return name if name in HIDDEN and whole else ""


def _server(run: Run) -> tuple[str, str, str, str]:
    found, spent, noise = uploads(run), _spent(run), _parts(run, "noise")
    sees, by, left = [], [], []
    if found:
        most = max(found, key=lambda seen: seen["values"])
        if ways := {hidden(seen) for seen in found} - {""} if all(map(hidden, found)) else set():
            [way] = ways
            what = f"the sum of {plural(_fewest(run, found), 'upload')} or more; {HIDDEN[way]}"
            by.append(f"{_sums(run)}: no upload is readable by itself")
            if _parts(run, "summed") and "clients" in spent:
                by.append(f"noise that clients add, in the sum: {_epsilon(spent['clients'])} for each client")
                left.append(COALITIONS[way])
            else:
                left.append(f"the sum; and {COALITIONS[way]}")
            left += _parts(run, "tells")
        else:
            what = f"each client's upload: {amount(most['values'])} values, {KINDS[most['kind']]}{_beside(most)}"
            if "cipher" in most["sealed"]:
                what = f"of each client's upload the part that is not encrypted{_beside(most)}"
                by.append(f"{_sums(run)}: the most sensitive coordinates are encrypted")
                left.append(f"the other coordinates, each client's by itself; and {COALITIONS['cipher']}")
        sees.append(what)
        by += [f"{name}: noise that each client adds to its upload (no ε is accounted for it)" for name in noise]
        if "examples" in spent:
            by.append(f"noise in each client's training: {_epsilon(spent['examples'])} for each example")
        if not by:
            left.append(OPEN)
        elif "examples" in spent and not all(map(hidden, found)):
            left.append("what a client's rows have in common")
    scored = sum(any(task in SCORES for task in record.get("seen", {})) for record in run.records)
    if scored:
        sees.append(f"sums over each client's held-out rows (loss, hits), {plural(scored, 'time')}")
        left.append("scores of held-out rows (evaluation.every: 0 leaves them out)")
    if not sees:
        return "server", "nothing", NO_TRAVEL, "–"
    return "server", _join(sees), _join(by) or NOTHING, _join(left) or "–"


def _fewest(run: Run, found: Sequence[Mapping[str, Any]]) -> int:
    """The uploads in the smallest sum."""
    summed = [count for record in run.rounds if (count := record.get("secure", {}).get("summed"))]
    return min(summed or [seen["clients"] for seen in found])


def _receivers(run: Run) -> tuple[str, str, str, str]:
    shares = any(record.get("shared_parameters") for record in run.records[:1])
    who = "clients and users"
    if not shares:
        return who, "nothing of others", NO_TRAVEL, "–"
    spent = _spent(run)
    by = [f"noise: {_epsilon(of)} for each {name.removesuffix('s')}" for name, of in spent.items()]
    if not by and _parts(run, "noise"):
        by.append("the noise of all clients (no ε is accounted for it)")
    left = "what many have in common" if spent else OPEN
    if spent and run.recipe.get("data", {}).get("deduplicate"):
        left += "; that rows of one decide which rows others train on (data.deduplicate), which ε does not count"
    return who, "the global model: clients after every round, users after the last", _join(by) or NOTHING, left


def _hostile(run: Run) -> tuple[str, str, str, str]:
    by = _parts(run, "resists")
    left = "uploads within what is let through" if by else "the mean: one client can turn it anywhere"
    return (
        "hostile clients",
        "what clients see; and they send what they like",
        _join(by) or f"{NOTHING} but checks of form",
        left,
    )


def _network(run: Run) -> list[tuple[str, str, str, str]]:
    if run.records[0].get("simulated", True):
        return []
    return [
        ("who listens on the network", "sealed traffic", "TLS, and signatures on tasks and replies", "who talks when")
    ]


def _beside(seen: Mapping[str, Any]) -> str:
    """What travels beside an upload, in words."""
    told = [metric for metric in seen["metrics"] if metric != "examples"]
    least, most = seen["weights"]
    counted = "examples" in seen["metrics"] or "weight" in seen["sealed"] or least != most or least not in (0, 1)
    told += ["the number of its examples"] if counted else []
    return f"; beside it {', '.join(told)}" if told else ""


def _spent(run: Run) -> Mapping[str, Mapping[str, float]]:
    return next((r["privacy"] for r in reversed(run.rounds) if r.get("privacy")), {})


def _epsilon(of: Mapping[str, float]) -> str:
    return f"ε = {figure(of['epsilon'])} at δ = {of['delta']:.1g}".replace("e-0", "e-")


def _parts(run: Run, does: str) -> list[str]:
    """The names of the parts at work that do this (:func:`fedfm.composition.protecting`)."""
    return list(run.records[0]["protecting"][does])


def _sums(run: Run) -> str:
    return _join(_parts(run, "sums"))


def _join(parts: Sequence[str]) -> str:
    return "; ".join(parts)
