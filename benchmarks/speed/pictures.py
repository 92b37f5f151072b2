"""Charts as SVG files that stand alone: light or dark as the reader's screen is, on a background of their own.

Letters in sizes: all lengths are in pixels of a drawing ``WIDTH`` wide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from fedfm.report.drawing import NOTHING, SHAPES, Axis, tag
from fedfm.report.units import figure

WIDTH = 760
ROW = 30
"""Height of a bar with the room around it."""
LIGHT = ("#6b7480", "#0b62c4", "#b65c00", "#00836f", "#a23a8c", "#c0392b", "#7a6400")
DARK = ("#97a1ae", "#5aa7ff", "#f0a23c", "#3fc9b0", "#e48fd0", "#ff7b6b", "#d6bf5c")
DASHES = ("none", "none", "7 4", "2 3", "9 3 2 3", "12 4", "4 4")
"""Of lines, so that colour is never the only difference."""
MOST_TICKS = 8
"""Of a logarithmic scale that shows 2 and 5, too."""
CIRCLE = "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0Z"


@dataclass(frozen=True)
class Bar:
    """A row of a bar chart.

    Args:
        name: left of it.
        value: its length.
        style: number of its colour.
        text: right of it; the value unless given.
    """

    name: str
    value: float
    style: int
    text: str = ""


@dataclass(frozen=True)
class Line:
    """A curve.

    Args:
        name: at its end.
        style: number of its colour.
        points: (x, y), with increasing x.
    """

    name: str
    style: int
    points: Sequence[tuple[float, float]]


def bars(title: str, rows: Sequence[Bar], unit: str, mark: tuple[str, float] | None = None) -> str:
    """Bars from zero, one below the other.

    Args:
        title: above them.
        rows: from top to bottom.
        unit: what the lengths are.
        mark: a value with a name, drawn as an upright line through all rows.
    """
    # Text is about 7.4 wide a letter where it is bold.
    left, top, right = max(80, 26 + round(7.4 * max(len(row.name) for row in rows))), 62, 96
    span, height = WIDTH - left - right, ROW * len(rows)
    scale = Axis.over([row.value for row in rows], zero=True)
    most = max(scale.high, mark[1] if mark else 0.0)

    def x(value: float) -> float:
        return left + span * value / most

    body = [_text(unit, left, 46, "quiet")]
    for i, row in enumerate(rows):
        y = top + ROW * i
        width = max(1.0, x(row.value) - left)
        strong = "strong" if row.style == 1 else ""
        body.append(_text(row.name, left - 10, y + 20, strong, "end"))
        body.append(tag("rect", x=left, y=y + 5, width=f"{width:.1f}", height=ROW - 10, class_=f"area s{row.style}"))
        body.append(_text(row.text or figure(row.value), left + width + 8, y + 20, strong))
    if mark:
        at = f"{x(mark[1]):.1f}"
        body.append(tag("line", x1=at, x2=at, y1=top - 4, y2=top + height + 4, class_="cut"))
        body.append(_text(mark[0], x(mark[1]), top + height + 20, "quiet", "middle"))
    return _drawing(title, body, top + height + (32 if mark else 16))


def lines(title: str, curves: Sequence[Line], x: str, y: str, *, height: int = 340) -> str:
    """Curves on logarithmic axes, named at their ends."""
    left, top, right, bottom = 64, 66, 190, 54
    places = [a for one in curves for a, _ in one.points]
    xs = _Log(places, left, WIDTH - right, ends=True)
    ys = _Log([b for one in curves for _, b in one.points], height - bottom, top)
    body = [_text(y, 16, 46, "quiet"), _text(x, WIDTH - right, height - 14, "quiet", "end")]
    for v in ys.ticks:
        body.append(tag("line", x1=left, x2=WIDTH - right, y1=f"{ys.at(v):.1f}", y2=f"{ys.at(v):.1f}", class_="grid"))
        body.append(_text(_plain(v), left - 8, ys.at(v) + 4, "quiet", "end"))
    for v in sorted(set(places)):
        body.append(_text(_plain(v), xs.at(v), height - bottom + 20, "quiet", "middle"))
    labels = _apart([ys.at(one.points[-1][1]) for one in curves], 17, top, height - bottom)
    for one, label in zip(curves, labels, strict=True):
        spots = [(xs.at(a), ys.at(b)) for a, b in one.points]
        way = " ".join(f"{a:.1f},{b:.1f}" for a, b in spots)
        body.append(tag("polyline", points=way, class_=f"line s{one.style}"))
        for (a, b), (_, value) in zip(spots, one.points, strict=True):
            said = tag("title", f"{one.name}: {figure(value)}")
            sign = CIRCLE if one.style < 2 else SHAPES[(one.style - 2) % len(SHAPES)]
            body.append(tag("path", said, d=sign, transform=f"translate({a:.1f} {b:.1f})", class_=f"area s{one.style}"))
        end, turn = spots[-1]
        if abs(label - turn) > 3:
            body.append(
                tag(
                    "line",
                    x1=f"{end + 7:.1f}",
                    y1=f"{turn:.1f}",
                    x2=f"{end + 20:.1f}",
                    y2=f"{label:.1f}",
                    class_="grid",
                )
            )
        body.append(_text(one.name, end + 24, label + 4, f"name s{one.style}"))
    return _drawing(title, body, height)


class _Log:
    """A logarithmic scale from values to pixels.

    Args:
        values: what it must hold, above 0.
        low, high: pixels of its ends.
        ends: whether it ends at the values and not at the next ticks.
    """

    def __init__(self, values: Sequence[float], low: float, high: float, ends: bool = False) -> None:
        least, most = min(values), max(values)
        decades = range(math.floor(math.log10(least)) - 1, math.ceil(math.log10(most)) + 1)
        tens = [10.0**decade for decade in decades]
        steps = [step * ten for ten in tens for step in (1, 2, 5)]
        first = max(step for step in steps if step <= least * 1.001)
        last = min(step for step in steps if step >= most * 0.999)
        self._first, self._last = (least, most) if ends else (first, last)
        if self._first == self._last:
            self._first, self._last = self._first / 2, self._last * 2
        self._low, self._high = low, high
        inside = [step for step in steps if first <= step <= last]
        self.ticks = inside if len(inside) <= MOST_TICKS else [step for step in inside if step in tens]

    def at(self, value: float) -> float:
        """Pixel of a value."""
        share = math.log(value / self._first) / math.log(self._last / self._first)
        return self._low + share * (self._high - self._low)


def _apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places near those wanted, but not nearer to each other than ``gap``, in the order given."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed: dict[int, float] = {}
    below = low - gap
    for i in order:
        below = placed[i] = max(wanted[i], below + gap)
    above = high + gap
    for i in reversed(order):
        above = placed[i] = min(placed[i], above - gap)
    return [placed[i] for i in range(len(wanted))]


def _plain(value: float) -> str:
    """A tick."""
    if value >= 1e6:
        return f"{value / 1e6:g} M"
    if value >= 1e4:
        return f"{value / 1e3:g} k"
    return f"{value:,.10g}"


def _text(text: str, x: float, y: float, class_: str = "", anchor: str = "start") -> Markup:
    return tag("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, class_=class_) if text else NOTHING


def _drawing(title: str, body: Sequence[Markup], height: int) -> str:
    """The whole file."""
    back = tag("rect", width=WIDTH, height=height, rx=8, class_="card")
    head = tag("text", title, x=16, y=26, class_="head")
    drawn = tag(
        "svg",
        tag("title", title),
        tag("style", Markup(_style())),
        back,
        head,
        *body,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH} {height}",
        width=WIDTH,
        height=height,
        role="img",
    )
    return f"{drawn}\n"


def _style() -> str:
    """Fonts and colours. Written out without variables, which converters to other formats do not know."""
    sizes = (
        "text{font:13px system-ui,sans-serif;font-variant-numeric:tabular-nums}.head{font-size:15px;font-weight:600}"
    )
    kinds = ".strong,.name{font-weight:600}.line{fill:none;stroke-width:2.25;stroke-linejoin:round}"
    dashes = "".join(f".line.s{i}{{stroke-dasharray:{dash}}}" for i, dash in enumerate(DASHES))
    day = _colours(LIGHT, {"card": "#fff", "ink": "#1a1f27", "quiet": "#58616e", "rule": "#dfe3e8"})
    night = _colours(DARK, {"card": "#1b2027", "ink": "#e6e9ee", "quiet": "#9fa9b6", "rule": "#313944"})
    return f"{sizes}{kinds}.cut{{stroke-dasharray:3 4}}{dashes}{day}@media(prefers-color-scheme:dark){{{night}}}"


def _colours(styles: Sequence[str], named: Mapping[str, str]) -> str:
    rules = [
        f".card{{fill:{named['card']};stroke:{named['rule']}}}text{{fill:{named['ink']}}}",
        f".quiet{{fill:{named['quiet']}}}.grid{{stroke:{named['rule']}}}.cut{{stroke:{named['quiet']}}}",
    ]
    rules += [f".area.s{i},.name.s{i}{{fill:{c}}}.line.s{i}{{stroke:{c}}}" for i, c in enumerate(styles)]
    return "".join(rules)
