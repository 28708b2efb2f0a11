"""What the benchmarks share: rivals take turns in one run, medians are compared, the result says where it ran."""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trivet import machine
from trivet.files import read_json, write_json


def arguments(description: str, rounds: int) -> argparse.ArgumentParser:
    """A parser with the options every benchmark takes."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=rounds, help="how often each rival takes its turn")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the measurement here as JSON")
    return parser


def prepare(options: argparse.Namespace) -> None:
    """The same allocator setting and number of threads for all rivals."""
    machine.keep_memory()
    torch.set_num_threads(options.threads)


def interleaved(
    rivals: Mapping[str, Callable[[int], Any]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of each rival's turns, and its first result. A turn is called with its round's number.

    One round is not counted: it warms caches and compiles. Who goes first rotates.
    """
    names = list(rivals)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    results: dict[str, Any] = {}
    for turn in range(-1, rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            result = rivals[name](max(turn, 0))
            elapsed = time.perf_counter() - start
            if turn >= 0:
                seconds[name].append(elapsed)
                results.setdefault(name, result)
    return seconds, results


def rows(seconds: Mapping[str, Sequence[float]], reference: str, **more: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each rival: its median and spread, how many times faster than `reference`, and `more` columns."""
    base = statistics.median(seconds[reference])
    return [
        {
            "rival": name,
            "median_seconds": statistics.median(times),
            "least_seconds": min(times),
            "most_seconds": max(times),
            "times_faster": base / statistics.median(times),
            **{column: values.get(name) for column, values in more.items()},
        }
        for name, times in seconds.items()
    ]


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """Student's interval for the mean of independent runs; None for a single one, which tells no spread."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    mean = statistics.fmean(values)
    half = float(t.ppf((1 + confidence) / 2, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return mean - half, mean + half


def show(title: str, table: Sequence[Mapping[str, Any]]) -> None:
    """`table` as aligned text."""
    print(f"\n{title}")
    cells = [[str(column) for column in table[0]], *([_text(value) for value in row.values()] for row in table)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    for row in cells:
        print(
            "  ".join(
                cell.ljust(w) if n == 0 else cell.rjust(w) for n, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
        )


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def earlier(options: argparse.Namespace, settings: Sequence[str], under: str) -> list[dict[str, Any]]:
    """What an interrupted run left in --out `under` this name; refused if it had other `settings` than `options`."""
    if not (options.out and options.out.exists()):
        return []
    found = read_json(options.out)
    different = [name for name in settings if found["settings"].get(name) != getattr(options, name)]
    if different:
        raise SystemExit(f"{options.out} has other {', '.join(different)}; write to another file, or remove it.")
    kept: list[dict[str, Any]] = found["results"][under]
    return kept


def save(options: argparse.Namespace, results: Any) -> None:
    """Write results with the settings, command, versions, machine and date to --out, if given."""
    if options.out:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        write_json(options.out, {**machine.describe(), "settings": settings, "results": results})
