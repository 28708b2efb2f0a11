"""What people see while they wait: progress with rate and time left on a terminal, silence elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


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
