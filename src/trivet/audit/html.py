"""Small pieces of a page. Every text goes through `text` or `tag`, which escape it; `Html` marks what is markup."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


class Html(str):
    """A piece of markup, safe to put on a page as it is."""

    __slots__ = ()


Content = str | Html | Sequence["Content"]


def text(content: Content) -> Html:
    """Markup of `content`: strings are escaped, markup is kept, sequences are joined."""
    if isinstance(content, Html):
        return content
    if isinstance(content, str):
        return Html(html.escape(content, quote=True))
    return Html("".join(text(each) for each in content))


def tag(name: str, *content: Content, **attributes: str | float | None) -> Html:
    """An element. Attributes that are None are left out; `class_` is class, and `_` stands for `-`."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(_number(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in ("img", "meta", "br"):
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{text(content)}</{name}>")


def table(head: Iterable[Content], rows: Iterable[Iterable[Content]], class_: str = "") -> Html:
    """A table whose first column heads its rows, in a box that scrolls sideways where the screen is narrow."""
    heads = [
        each if isinstance(each, Html) and each.startswith("<th") else tag("th", each, scope="col") for each in head
    ]
    lines = []
    for row in rows:
        first, *others = row
        cells = [each if isinstance(each, Html) and each.startswith("<td") else tag("td", each) for each in others]
        lines.append(tag("tr", tag("th", first, scope="row"), cells))
    body = tag("table", tag("thead", tag("tr", heads)), tag("tbody", lines), class_=class_ or None)
    return tag("div", body, class_="scroll")


def facts(pairs: Iterable[tuple[str, Content]]) -> Html:
    """Names and values."""
    return tag("dl", [tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs], class_="facts")


def section(anchor: str, title: str, *content: Content, lead: str = "") -> Html:
    return tag("section", tag("h2", title), tag("p", lead, class_="lead") if lead else "", *content, id=anchor)


def _number(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"
