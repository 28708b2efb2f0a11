"""Charts as inline SVG: drawn in the page's own type and colours, so that they follow light, dark and print."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from trivet.audit.html import Html, tag

_WIDTH, _HEIGHT = 520.0, 280.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 44.0, 14.0, 12.0, 40.0
_BREAK = 52.0  # room for an axis break and the one tick behind it
HUES = 8


@dataclass(frozen=True)
class Series:
    """A line: points (x, y), a band (x, low, high) around it, and the number of its colour."""

    name: str
    hue: int
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float, float]] = ()
    marks: bool = True


@dataclass(frozen=True)
class Axis:
    """Where the x values go: linear up to `last`, and one value behind a break, if any."""

    last: float
    behind: float | None
    ticks: Sequence[tuple[float, str]]

    def __call__(self, x: float) -> float:
        width = _WIDTH - _LEFT - _RIGHT - (_BREAK if self.behind is not None else 0.0)
        if self.behind is not None and x > self.last:
            return _WIDTH - _RIGHT - 6.0
        return _LEFT + (width * x / self.last if self.last else 0.0)


def radius_axis(radii: Sequence[float], write: Callable[[float], str]) -> Axis:
    """An axis for radii; the greatest goes behind a break where it is more than twice the next."""
    ordered = sorted(set(radii))
    behind = ordered.pop() if len(ordered) > 2 and ordered[-1] > 2 * ordered[-2] else None
    last = ordered[-1]
    shown = ordered if len(ordered) <= 9 else nice_ticks(last)
    ticks = [(x, write(x)) for x in shown] + ([(behind, write(behind))] if behind is not None else [])
    return Axis(last, behind, ticks)


def nice_ticks(last: float, about: int = 5) -> list[float]:
    """Round numbers from 0 to `last`."""
    if last <= 0:
        return [0.0]
    magnitude = 10 ** math.floor(math.log10(last / about))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if last / (m * magnitude) <= about)
    return [step * i for i in range(int(last / step + 1e-9) + 1)]


def line_chart(
    series: Sequence[Series],
    axis: Axis,
    *,
    x_title: str,
    y_title: str,
    top: float = 1.0,
    percent: bool = True,
    marker: tuple[float, str] | None = None,
) -> Html:
    """Lines over `axis`, y from 0 to `top`; `marker` is a labelled vertical line, such as the threat's radius."""

    def y_of(y: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * min(y, top) / (top or 1.0)

    parts = [_y_grid(y_of, top, percent), _x_ticks(axis)]
    if marker is not None:
        x = axis(marker[0])
        parts.append(tag("line", x1=x, x2=x, y1=_TOP, y2=_HEIGHT - _BOTTOM, class_="marker"))
        parts.append(tag("text", marker[1], x=x + 4, y=_TOP + 9, class_="note"))
    for each in series:
        if each.band:
            reached = [point for point in each.band if axis.behind is None or point[0] <= axis.last]
            upper = [(axis(x), y_of(high)) for x, _, high in reached]
            lower = [(axis(x), y_of(low)) for x, low, _ in reversed(reached)]
            parts.append(tag("polygon", points=_path([*upper, *lower]), class_=f"band hue{each.hue % HUES}"))
    for each in series:
        parts += _line(each, axis, y_of, percent)
    parts.append(tag("text", x_title, x=(_LEFT + _WIDTH - _RIGHT) / 2, y=_HEIGHT - 6, class_="title middle"))
    label = f"{y_title} against {x_title}: {', '.join(each.name for each in series)}"
    return _svg(_WIDTH, _HEIGHT, label, parts)


def _line(series: Series, axis: Axis, y_of: Callable[[float], float], percent: bool) -> list[Html]:
    hue = f"hue{series.hue % HUES}"
    reached = [(axis(x), y_of(y)) for x, y in series.points if axis.behind is None or x <= axis.last]
    parts = [tag("polyline", points=_path(reached), class_=f"line {hue}")] if len(reached) > 1 else []
    beyond = [(axis(x), y_of(y)) for x, y in series.points if axis.behind is not None and x > axis.last]
    if beyond and reached:
        parts.append(tag("polyline", points=_path([reached[-1], beyond[0]]), class_=f"line far {hue}"))
    for x, y in series.points if series.marks else ():
        said = f"{series.name}: {100 * y:.1f} % at {x:.4g}" if percent else f"{series.name}: {y:.4g} at {x:.4g}"
        parts.append(tag("circle", tag("title", said), cx=axis(x), cy=y_of(y), r=2.8, class_=f"mark {hue}"))
    return parts


def _y_grid(y_of: Callable[[float], float], top: float, percent: bool) -> Html:
    ticks = [0.0, 0.25, 0.5, 0.75, 1.0] if percent else nice_ticks(top, 4)
    lines = []
    for tick in ticks:
        y = y_of(tick)
        lines.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="grid" if tick else "axis"))
        said = f"{100 * tick:.0f} %" if percent else f"{tick:.4g}"
        lines.append(tag("text", said, x=_LEFT - 7, y=y + 3.5, class_="tick end"))
    return tag("g", lines)


def _x_ticks(axis: Axis) -> Html:
    foot = _HEIGHT - _BOTTOM
    parts = []
    for x, said in axis.ticks:
        parts.append(tag("line", x1=axis(x), x2=axis(x), y1=foot, y2=foot + 4, class_="axis"))
        parts.append(tag("text", said, x=axis(x), y=foot + 16, class_="tick middle"))
    if axis.behind is not None:
        middle = (axis(axis.last) + axis(axis.behind)) / 2
        for shift in (-3.0, 3.0):
            x = middle + shift
            parts.append(tag("line", x1=x - 3, x2=x + 3, y1=foot + 5, y2=foot - 5, class_="axis"))
    return tag("g", parts)


def class_bars(
    names: Sequence[str], clean: Sequence[float], worst: Sequence[tuple[float, float, float]], hue: int
) -> Html:
    """A row for each class: accuracy without attack (pale), under attack (full), and the latter's interval.

    `worst` holds (value, low, high).
    """
    shown = [name if len(name) <= 14 else name[:13] + "…" for name in names]
    row, left, right = 19.0, 16.0 + 6.5 * max(map(len, shown)), 34.0
    foot = row * len(names) + 2

    def x_of(value: float) -> float:
        return left + (_WIDTH - left - right) * value

    parts = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(tag("line", x1=x_of(tick), x2=x_of(tick), y1=0, y2=foot, class_="grid" if tick else "axis"))
        parts.append(tag("text", f"{100 * tick:.0f} %", x=x_of(tick), y=foot + 15, class_="tick middle"))
    for number, (name, pale, (value, low, high)) in enumerate(zip(names, clean, worst, strict=True)):
        y = row * number + 4
        said = (
            f"{name}: {100 * pale:.1f} % clean, {100 * value:.1f} % under attack ({100 * low:.1f} to {100 * high:.1f})"
        )
        parts.append(
            tag(
                "g",
                tag("title", said),
                tag("text", shown[number], x=left - 8, y=y + 10, class_="tick end"),
                tag("rect", x=left, y=y, width=x_of(pale) - left, height=12, class_=f"bar pale hue{hue % HUES}"),
                tag("rect", x=left, y=y, width=x_of(value) - left, height=12, class_=f"bar hue{hue % HUES}"),
                tag("line", x1=x_of(low), x2=x_of(high), y1=y + 6, y2=y + 6, class_="whisker"),
                tag("text", f"{100 * value:.0f}", x=_WIDTH - 2, y=y + 10, class_="tick end"),
            )
        )
    return _svg(_WIDTH, foot + 20, "accuracy by class, without and under attack", parts)


def histogram(counts: Sequence[int], hue: int, *, x_title: str, y_title: str) -> Html:
    """A bar for each of the equal parts of [0, 1] that `counts` were made of, half as high as other charts."""
    height, top = _HEIGHT / 2, max(counts, default=0) or 1
    foot, wide = height - _BOTTOM, (_WIDTH - _LEFT - _RIGHT) / len(counts)

    def y_of(y: float) -> float:
        return foot - (foot - _TOP) * y / top

    parts = []
    for tick in nice_ticks(top, 2):
        y = y_of(tick)
        parts.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="grid" if tick else "axis"))
        parts.append(tag("text", f"{tick:.4g}", x=_LEFT - 7, y=y + 3.5, class_="tick end"))
    for x in (0.0, 0.25, 0.5, 0.75, 1.0):
        place = _LEFT + (_WIDTH - _LEFT - _RIGHT) * x
        parts.append(tag("text", f"{x:g}", x=place, y=foot + 16, class_="tick middle"))
    for number, count in enumerate(counts):
        low, high = number / len(counts), (number + 1) / len(counts)
        said = tag("title", f"{count} between {low:.4g} and {high:.4g}")
        bar = {"x": _LEFT + wide * number + 0.5, "y": y_of(count), "width": wide - 1, "height": foot - y_of(count)}
        parts.append(tag("rect", said, **bar, class_=f"bar hue{hue % HUES}"))
    parts.append(tag("text", x_title, x=(_LEFT + _WIDTH - _RIGHT) / 2, y=height - 6, class_="title middle"))
    return _svg(_WIDTH, height, f"{y_title} by {x_title}", parts)


@dataclass(frozen=True)
class Decades:
    """A logarithmic scale from 10^first to 10^last; what lies below is drawn at its foot."""

    first: int
    last: int

    def __call__(self, value: float) -> float:
        """The place of `value`, between 0 and 1."""
        exponent = math.log10(value) if value > 0 else -math.inf
        return (min(max(exponent, self.first), self.last) - self.first) / (self.last - self.first)

    @property
    def ticks(self) -> list[float]:
        every = -(-(self.last - self.first) // 6)
        return [10.0**exponent for exponent in range(self.last, self.first - 1, -every)]


def decades(values: Iterable[float], most: int = 8) -> Decades:
    """Whole decades around the positive ones of `values`; at most `most`, the lowest left out."""
    positive = [value for value in values if value > 0] or [1.0]
    last = math.ceil(math.log10(max(positive)) - 1e-9)
    first = math.floor(math.log10(min(positive)) + 1e-9)
    return Decades(max(min(first, last - 1), last - most), last)


def power_of_ten(value: float) -> str:
    """E.g. "10⁻³"; 0.1, 1 and 10 as they are."""
    exponent = round(math.log10(value))
    if abs(exponent) <= 1:
        return f"{value:g}"
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def scatter(series: Sequence[Series], last: float, *, x_title: str, y_title: str) -> Html:
    """Points, x linear from 0 to `last`, y logarithmic."""
    axis = Axis(last, None, [(x, f"{x:.4g}") for x in nice_ticks(last)])
    scale = decades(y for each in series for _, y in each.points)

    def y_of(y: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * scale(y)

    parts = [_log_grid(scale, y_of, power_of_ten), _x_ticks(axis)]
    for each in series:
        for x, y in each.points:
            parts.append(tag("circle", cx=axis(x), cy=y_of(y), r=2.8, class_=f"dot hue{each.hue % HUES}"))
    parts.append(tag("text", x_title, x=(_LEFT + _WIDTH - _RIGHT) / 2, y=_HEIGHT - 6, class_="title middle"))
    label = f"{y_title} against {x_title}, a point for each record: {', '.join(each.name for each in series)}"
    return _svg(_WIDTH, _HEIGHT, label, parts)


def roc_chart(series: Sequence[Series]) -> Html:
    """True over false positive rates (x, y), both logarithmic; the dotted diagonal is guessing."""
    scale = decades((x for each in series for x, _ in each.points), most=5)
    scale = Decades(scale.first, 0)

    def x_of(x: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * scale(x)

    def y_of(y: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * scale(y)

    def percent(rate: float) -> str:
        return f"{100 * rate:g} %"

    foot, parts = _HEIGHT - _BOTTOM, [_log_grid(scale, y_of, percent)]
    for tick in scale.ticks:
        parts.append(tag("line", x1=x_of(tick), x2=x_of(tick), y1=foot, y2=foot + 4, class_="axis"))
        parts.append(tag("text", percent(tick), x=x_of(tick), y=foot + 16, class_="tick middle"))
    parts.append(tag("line", x1=x_of(0.0), x2=x_of(1.0), y1=y_of(0.0), y2=y_of(1.0), class_="marker"))
    for each in series:
        path = _path([(x_of(x), y_of(y)) for x, y in each.points])
        parts.append(tag("polyline", tag("title", each.name), points=path, class_=f"line hue{each.hue % HUES}"))
    title = tag("text", "false positive rate", x=(_LEFT + _WIDTH - _RIGHT) / 2, y=_HEIGHT - 6, class_="title middle")
    names = ", ".join(each.name for each in series)
    return _svg(_WIDTH, _HEIGHT, f"true over false positive rate of {names}", [*parts, title])


def _log_grid(scale: Decades, y_of: Callable[[float], float], write: Callable[[float], str]) -> Html:
    lines = []
    for tick in scale.ticks:
        y = y_of(tick)
        lines.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="grid"))
        lines.append(tag("text", write(tick), x=_LEFT - 7, y=y + 3.5, class_="tick end"))
    lines.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=_HEIGHT - _BOTTOM, y2=_HEIGHT - _BOTTOM, class_="axis"))
    return tag("g", lines)


@dataclass(frozen=True)
class Bound:
    """A row of `bounds`: what is known of a number from one side.

    Attributes:
        name, said: written above the row.
        low: everything up to here is excluded. high: everything above is; None if nothing is known from above.
        marks: other values worth a tick, with their names.
        wrong: whether the row contradicts another.
    """

    name: str
    said: str
    low: float
    high: float | None = None
    marks: Sequence[tuple[float, str]] = ()
    wrong: bool = False


def bounds(rows: Sequence[Bound], claimed: float | None, *, title: str) -> Html:
    """What is known of one number that is not negative, source by source; `claimed` is a labelled vertical line."""
    values = [each.low for each in rows] + [each.high or 0.0 for each in rows] + [claimed or 0.0]
    values += [value for each in rows for value, _ in each.marks]
    last = 1.08 * max(values) or 1.0
    row, left, top = 38.0, 6.0, 20.0 if claimed is not None else 6.0
    foot = top + row * len(rows) + 4

    def x_of(value: float) -> float:
        return left + (_WIDTH - left - _RIGHT) * value / last

    parts = []
    for tick in nice_ticks(last):
        parts.append(tag("line", x1=x_of(tick), x2=x_of(tick), y1=top, y2=foot, class_="grid" if tick else "axis"))
        parts.append(tag("text", f"{tick:.4g}", x=x_of(tick), y=foot + 15, class_="tick middle"))
    for number, each in enumerate(rows):
        parts += _bound(each, top + row * number, x_of)
    if claimed is not None:
        x = x_of(claimed)
        for number in range(len(rows)):  # beside the bars only: it would strike the words through
            y = top + row * number + 18
            parts.append(tag("line", x1=x, x2=x, y1=y, y2=y + 18, class_="claimed"))
        parts.append(tag("line", x1=x, x2=x, y1=top - 6, y2=top, class_="claimed"))
        side = "end" if x > _WIDTH / 2 else None
        parts.append(tag("text", "claimed: at most", x=x, y=top - 9, class_=side))
    parts.append(tag("text", title, x=_WIDTH / 2, y=foot + 32, class_="title middle"))
    label = f"{title}: " + "; ".join(f"{each.name}, {each.said}" for each in rows)
    return _svg(_WIDTH, foot + 38, label, parts)


def _bound(row: Bound, y: float, x_of: Callable[[float], float]) -> list[Html]:
    middle = y + 27
    kind = " wrong" if row.wrong else ""
    parts = [
        tag("rect", x=x_of(0.0), y=middle - 5, width=x_of(row.low) - x_of(0.0), height=10, class_=f"atleast{kind}"),
    ]
    if row.low > 0:
        parts.append(tag("line", x1=x_of(row.low), x2=x_of(row.low), y1=middle - 7, y2=middle + 7, class_=f"end{kind}"))
    if row.high is not None:
        parts.append(tag("line", x1=x_of(row.low), x2=x_of(row.high), y1=middle, y2=middle, class_="between"))
        parts.append(tag("line", x1=x_of(row.high), x2=x_of(row.high), y1=middle - 7, y2=middle + 7, class_="end"))
    for value, name in row.marks:
        dot = tag("circle", tag("title", f"{name}: {value:.4g}"), cx=x_of(value), cy=middle, r=3, class_="other")
        parts.append(dot)
    said = tag("tspan", row.said, class_=f"said{kind}")
    parts.append(tag("text", f"{row.name}: ", said, x=x_of(0.0) + 4, y=y + 14))
    return parts


def whisker(value: float, low: float, high: float, width: float = 80.0) -> Html:
    """A rate with its interval on a scale from 0 to 1, as small as a word."""
    x = max(1.0, min(width - 1.0, width * value))
    parts = [
        tag("line", x1=0, x2=width, y1=5, y2=5, class_="grid"),
        tag("line", x1=width * low, x2=width * high, y1=5, y2=5, class_="span"),
        tag("line", x1=x, x2=x, y1=1, y2=9, class_="value"),
    ]
    style = f"width: {width:g}px"
    return tag("svg", parts, viewBox=f"0 0 {width:g} 10", class_="whisker", aria_hidden="true", style=style)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _svg(width: float, height: float, label: str, parts: Sequence[Html]) -> Html:
    return tag("svg", parts, viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=label, class_="chart")


def thinned(points: Sequence[tuple[float, float]], most: int = 240) -> list[tuple[float, float]]:
    """At most about `most` points: the means of equal runs of them."""
    size = max(1, math.ceil(len(points) / most))
    starts = [*range(0, len(points), size), len(points)]
    runs = [points[a:b] for a, b in pairwise(starts)]
    return [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs if run]
