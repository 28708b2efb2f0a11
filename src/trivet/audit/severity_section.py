"""The report's section about the severity of mistakes."""

from __future__ import annotations

from collections.abc import Sequence

from trivet.audit import charts
from trivet.audit.cells import DASH, key, rate, right
from trivet.audit.html import Html, section, table, tag
from trivet.audit.severity_finding import Mistakes, Ranked, SeverityFinding
from trivet.audit.subject import Subject

_WIDTH, _LEFT, _ROW, _BAR = 520.0, 190.0, 19.0, 12.0


def section_of(subjects: Sequence[Subject]) -> Html:
    """The part of the report about severity: for each model its conditions, a picture of them, and its rankings."""
    parts = []
    for number, subject in enumerate(subjects):
        made = subject.findings.severity
        if made is None:
            continue
        rows = [_row(each) for each in made.conditions]
        parts.append(tag("h3", key(number, subject.name)))
        heads = [right(name) for name in ("mistakes, %", "severity", "hdist@1", *_named(made.height))]
        parts.append(table(["under", *heads], rows))
        caption = "Share of records that are answered wrong: the more severe the mistake, the darker."
        parts.append(tag("div", tag("figure", _bars(made, number), tag("figcaption", caption)), class_="grid"))
        cells = [[f"{each.k}", *(_number(value) for value in _measures(each).values())] for each in made.ranked]
        if cells:
            parts.append(table(["best k classes", *map(right, _measures(made.ranked[0]))], cells))
    if not parts:
        return Html("")
    first = next(made for subject in subjects if (made := subject.findings.severity) is not None)
    lead = (
        "D is the height of the lowest common ancestor of the label and the answer in the tree of the classes, "
        "severity its mean over mistakes (Bertinetto et al., CVPR 2020) with an exact interval, hdist@1 its mean over "
        "all records. Severity alone favours models with many near misses. Mistakes made at random would have "
        f"{first.chance:.3g}. Rows marked * hold an attack that looks for severe mistakes: what can be forced, not "
        "what usually happens."
    )
    return section("severity", "Severity of mistakes", *parts, lead=lead)


def _row(made: Mistakes) -> list[Html | str]:
    span = "" if made.interval is None else f"{made.interval[0]:.2f} to {made.interval[1]:.2f}"
    said = DASH
    if made.severity is not None:
        said = tag("td", f"{made.severity:.3f}", tag("span", span, class_="small"), class_="number stacked")
    counts = [tag("td", str(count), class_="number") for count in made.by_height]
    return [made.label + (" *" if made.aimed else ""), rate(made.error), said, _number(made.hdist), *counts]


def _named(height: int) -> list[str]:
    return [f"D = {h}" for h in range(1, height + 1)]


def _number(value: float | None) -> Html:
    return DASH if value is None else tag("td", f"{value:.3f}", class_="number")


def _measures(made: Ranked) -> dict[str, float | None]:
    return {
        "hdist": made.hdist,
        "best": made.best,
        "of mistakes": made.mistakes,
        "hprecision": made.hprecision,
        "hmAP": made.hmap,
    }


def _bars(made: SeverityFinding, number: int) -> Html:
    """A bar for each condition, the share of records with a mistake of each height, the most severe first."""
    foot = _ROW * len(made.conditions) + 2

    def x_of(share: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - 20) * share

    parts = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(tag("line", x1=x_of(tick), x2=x_of(tick), y1=0, y2=foot, class_="grid" if tick else "axis"))
        parts.append(tag("text", f"{100 * tick:.0f} %", x=x_of(tick), y=foot + 15, class_="tick middle"))
    for row, each in enumerate(made.conditions):
        y, before = _ROW * row + 4, 0.0
        name = each.label if len(each.label) <= 29 else each.label[:28] + "…"
        parts.append(tag("text", name, x=_LEFT - 8, y=y + 10, class_="tick end"))
        for height in range(made.height, 0, -1):
            share = each.by_height[height - 1] / each.error.trials
            place = {"x": x_of(before), "y": y, "width": x_of(share) - _LEFT, "height": _BAR}
            said = tag("title", f"{each.label}: {100 * share:.1f} % with D = {height}")
            dark = 0.2 + 0.8 * height / made.height
            parts.append(tag("rect", said, **place, class_=f"bar hue{number % charts.HUES}", fill_opacity=dark))
            before += share
    label = "share of records by the height of their mistake"
    return tag("svg", parts, viewBox=f"0 0 {_WIDTH:g} {foot + 20:g}", role="img", aria_label=label, class_="chart")
