"""Cells that several sections of the report share: a model's name, rates with their intervals, sizes, times."""

from __future__ import annotations

from trivet.audit import charts
from trivet.audit.findings import Findings
from trivet.audit.html import Content, Html, tag
from trivet.statistics import Rate

DASH = Html('<td class="none">-</td>')


def key(number: int, name: str) -> Html:
    """A model's name with the colour its lines have."""
    return tag("span", tag("i", class_=f"swatch hue{number % charts.HUES}"), name, class_="key")


def right(title: str) -> Html:
    """The head of a column of numbers."""
    return tag("th", title, scope="col", class_="number")


def rate(found: Rate | None, below: str = "") -> Html:
    """A rate in percent, its interval drawn and written underneath."""
    if found is None:
        return DASH
    low, high = found.interval
    note = tag("span", below, class_="small") if below else ""
    drawn = charts.whisker(found.value, low, high, 72)
    return tag("td", percent(found), drawn, tag("span", interval(found), class_="small"), note, class_="number stacked")


def rate_in_line(found: Rate | None, note: str = "") -> list[Content]:
    """The same as three cells beside each other: the number, the drawing, the interval."""
    if found is None:
        return [tag("td", note, class_="none", colspan="3")]
    low, high = found.interval
    drawn = tag("td", charts.whisker(found.value, low, high, 160), class_="drawn")
    return [tag("td", percent(found), class_="number"), drawn, tag("td", interval(found), class_="number small")]


def percent(found: Rate) -> Html:
    return tag("span", f"{100 * found.value:.1f}", class_="figure")


def interval(found: Rate) -> str:
    low, high = found.interval
    return f"{100 * low:.1f} to {100 * high:.1f}"


def amount(value: str, unit: str, note: str = "") -> Html:
    below = tag("div", note, class_="small") if note else ""
    return tag(
        "td", tag("span", value, class_="figure"), " ", tag("span", unit, class_="small"), below, class_="number"
    )


def size(file_bytes: int) -> tuple[str, str]:
    """Three digits and a unit."""
    for unit, factor in (("MB", 1e6), ("kB", 1e3)):
        if file_bytes >= factor:
            return f"{file_bytes / factor:.3g}", unit
    return str(file_bytes), "bytes"


def seconds(duration: float) -> str:
    if duration < 10:
        return f"{duration:.2g} s"
    return f"{duration:.0f} s" if duration < 120 else f"{duration / 60:.0f} min"


def state(found: Findings) -> Html:
    """How many checks were raised."""
    made = sum(check.raised is not None for check in found.checks)
    kind = "error" if any(check.severity == "error" for check in found.flags) else "warning"
    return tag("span", f"{len(found.flags)} of {made} raised", class_=f"badge {kind if found.flags else 'ok'}")
