"""Writes the tables of methods and recipes into the pages that show them: `python docs/tables.py`.

A table stands between the comments `<!-- NAME -->` and `<!-- end NAME -->`. The tests compare every page with what this
would write, so that no table outlives what it lists.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from trivet.audit.table import threat_text
from trivet.methods import ROOMS, Method, methods
from trivet.recipes.recipe import load, shipped

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/methods.md", "docs/recipes.md")


def rooms() -> str:
    """One row for each room: what it is for, and the methods in it."""
    rows = []
    for room in ROOMS:
        purpose = re.split("[:,]", str(importlib.import_module(f"trivet.{room}").__doc__))[0].rstrip(".")
        listed = "; ".join(f"{each.title} ({each.year})" if each.year else each.title for each in methods(room))
        rows.append((f"`{room}`", purpose, listed or "none yet"))
    return _table(("room", "", "methods in 0.1"), rows)


def all_methods() -> str:
    """A table for each room: every method with its paper, its settings, and what to know before trusting it."""
    parts = []
    for room in ROOMS:
        rows = [_method(each) for each in methods(room)]
        title = f"## {room}\n\n{importlib.import_module(f'trivet.{room}').__doc__}\n\n"
        parts.append(title + (_table(("name", "method", "paper", "settings"), rows) if rows else "No methods yet."))
    return "\n\n".join(parts)


def _method(each: Method) -> tuple[str, ...]:
    title = each.title + (f" ({each.note})" if each.note else "")
    return f"`{each.name}`", title, each.paper, ", ".join(f"`{name}`" for name in each.settings)


def recipes() -> str:
    """Every shipped recipe."""
    rows = []
    for name in shipped():
        recipe = load(name).recipe
        named = recipe.data or recipe.environment
        source = f"`{named['name']}`" if named else "yours"
        rows.append((f"`{name}`", recipe.about, source, threat_text(recipe.threat), recipe.paper))
    return _table(("recipe", "about", "data", "threat", "paper"), rows)


TABLES: dict[str, Callable[[], str]] = {"rooms": rooms, "all_methods": all_methods, "recipes": recipes}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def refreshed(page: str) -> str:
    """`page` with every marked table written anew."""
    for name, table in TABLES.items():
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if marked.search(page):
            content = table()
            page = marked.sub(lambda found, content=content: f"{found[1]}\n{content}\n\n{found[2]}", page)
    return page


if __name__ == "__main__":
    for path in (ROOT / name for name in PAGES):
        path.write_text(refreshed(path.read_text()))
