"""What people see: progress with rate and time left while they wait, on a terminal; tables, or JSON for machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol


class Advance(Protocol):
    """Report `amount` more units of work done, and optionally a few words on how it stands."""

    def __call__(self, amount: float = 1, /, note: str = "") -> None: ...


@contextmanager
def progress(task: str, total: float) -> Iterator[Advance]:
    """A progress line on standard error for `total` units of work; nothing at all when that is no terminal."""
    if not sys.stderr.isatty():
        yield _silent
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        handle = bar.add_task(task, total=total, note="", rate="")

        def advance(amount: float = 1, /, note: str = "") -> None:
            bar.advance(handle, amount)
            speed = bar.tasks[handle].speed
            bar.update(handle, rate=f"{speed:.3g}/s" if speed else "")
            if note:
                bar.update(handle, note=note)

        yield advance


def _silent(amount: float = 1, /, note: str = "") -> None:
    pass


def show_models(rows: Sequence[dict[str, Any]]) -> None:
    """Models as columns while they fit beside each other: their names are longer than their numbers."""
    if len(rows) > 4:
        show(rows, False)
        return
    measures = [key for key in rows[0] if key != "model"]
    show([{"": key, **{str(row["model"]): row[key] for row in rows}} for key in measures], False)


def show(rows: Sequence[dict[str, Any]], as_json: bool, title: str | None = None) -> None:
    """Rows with the same columns as a table for people, or as JSON for machines."""
    if as_json:
        show_json(rows)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, box=None, header_style="bold", pad_edge=False, title_justify="left")
    for column in rows[0] if rows else ():
        number = any(isinstance(row[column], (int, float)) for row in rows)
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    Console().print(table)


def show_json(value: Any) -> None:
    """`value` as JSON on standard output; NaN and infinity are errors."""
    print(json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False))
