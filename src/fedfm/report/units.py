"""Numbers as people read them. Sizes count in thousands: 1 kB is 1000 bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence


def figure(value: float | None) -> str:
    """A metric to three digits or so; a dash for a number that is not finite.

    >>> figure(4.1), figure(2304.6), figure(0.3), figure(0.01234), figure(None)
    ('4.10', '2,305', '0.300', '0.0123', '–')
    """
    if value is None or not math.isfinite(value):
        return "–"
    magnitude = abs(value)
    if magnitude >= 1e6:
        return f"{value:.1e}"
    if magnitude >= 100:
        return f"{value:,.0f}"
    if magnitude >= 10:
        return f"{value:.1f}"
    if magnitude >= 1 or not value:
        return f"{value:.2f}"
    return f"{value:.3f}" if magnitude >= 0.1 else f"{value:.3g}"


def size(count: float) -> str:
    """Bytes.

    >>> size(950), size(1_536_000), size(10_000_000)
    ('950 B', '1.54 MB', '10 MB')
    """
    return scaled(count, ("B", "kB", "MB", "GB", "TB"))


def amount(count: float) -> str:
    """A number of things; exact below ten thousand.

    >>> amount(9_216), amount(134_515_008)
    ('9,216', '135 M')
    """
    return f"{count:,.0f}" if count < 10_000 else scaled(count, ("", "k", "M", "G", "T"))


def average(count: float) -> str:
    """A mean or median of whole numbers.

    >>> average(15), average(14.62)
    ('15', '14.6')
    """
    return f"{count:,.0f}" if float(count).is_integer() else f"{count:,.1f}"


def scaled(value: float, steps: Sequence[str]) -> str:
    """Three digits and the unit, each of which is 1000 times the one before."""
    position = 0
    # 999.5 would round to 1000 of the smaller unit.
    while value >= 999.5 and position < len(steps) - 1:
        value, position = value / 1000, position + 1
    return f"{value:.3g} {steps[position]}".strip() if value < 1000 else f"{value:,.0f} {steps[position]}"


def duration(seconds: float) -> str:
    """A time.

    >>> duration(0.25), duration(59.96), duration(3725)
    ('0.25 s', '1 min 00 s', '1 h 02 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def percent(part: float, whole: float) -> str:
    """A share.

    >>> percent(460_800, 134_515_008)
    '0.34 %'
    """
    return f"{100 * part / whole:.2g} %" if part < whole else "100 %"


def plural(count: int, noun: str) -> str:
    """A number with its noun.

    >>> plural(1, "round"), plural(5, "round")
    ('1 round', '5 rounds')
    """
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
