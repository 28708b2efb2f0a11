"""What has been spent on a data set, by every run that ever trained on it: written before it is spent.

One folder for each data set, known by the SHA-256 of its records, with one file for each stage of each run. Files
are only ever added to, so a crash can make them claim too much, never too little. Runs that were deleted stay.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trivet.errors import TrivetError
from trivet.files import read_json, sole_writer, write_json
from trivet.privacy.mechanism import Event

FORMAT = 1
_AHEAD = 1.0  # seconds of steps written down at once: what a kill may cost, against a disk flush for every step


def budget_folder() -> Path:
    """Where budgets are kept: $TRIVET_BUDGET, or trivet/budget in the user's state folder.

    Outside every run folder, because what was spent stays spent when a run is deleted.
    """
    given = os.environ.get("TRIVET_BUDGET")
    if given:
        return Path(given)
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "trivet" / "budget"


@dataclass(frozen=True)
class Spending:
    """What one stage of one run spent.

    Attributes:
        data: SHA-256 of the records.
        name: of the data set; records: how many it has.
        run: the run's own name for itself, for good; path: the folder it was last worked on in.
        event, steps: how many times it released what.
        purpose: "training", or "leak test" for models trained to be attacked, which nobody keeps.
    """

    data: str
    name: str
    records: int
    run: str
    stage: str
    path: str
    event: Event
    steps: int
    purpose: str = "training"

    @classmethod
    def parse(cls, content: Any, where: Path) -> Spending:
        """The spending written in the file `where`."""
        try:
            if content["format"] != FORMAT:
                raise TrivetError(f"{where} is in format {content['format']}; it was written by another Trivet.")
            fields = {key: value for key, value in content.items() if key not in ("format", "updated")}
            return cls(**{**fields, "event": Event(**fields["event"])})
        except (KeyError, TypeError) as error:
            raise TrivetError(f"{where} is no record of spent privacy ({error}); restore it from a backup.") from None


class Spender:
    """The account of one stage of one run: `reserve` before every step, and the step may be made."""

    def __init__(self, spending: Spending, most: int) -> None:
        self.spending, self.most = spending, most
        folder = budget_folder() / spending.data[:32]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrivetError(
                f"cannot keep the privacy budget in {folder} ({error.strerror}); set TRIVET_BUDGET to another folder."
            ) from None
        self._path = folder / f"{spending.run}-{spending.stage}.json"
        self._reserved, self._taken, self._began = 0, 0, time.monotonic()

    @property
    def steps(self) -> int:
        """How many steps are written down as spent, by this session and all before it."""
        return Spending.parse(read_json(self._path), self._path).steps if self._path.exists() else 0

    def at_least(self, steps: int) -> None:
        """Write down `steps` as spent where fewer are: a budget lost or left on another machine is made up for."""
        if self.steps < steps:
            self._write(steps - self.steps)

    def reserve(self) -> None:
        """Return once the next step is durably written down as spent. It may be taken then, and not before."""
        if self._taken == self._reserved:
            pace = (time.monotonic() - self._began) / self._taken if self._taken else _AHEAD
            ahead = max(1, min(int(_AHEAD / max(pace, 1e-6)), self.most - self.steps))
            self._write(ahead)
            self._reserved += ahead
        self._taken += 1

    def _write(self, more: int) -> None:
        with sole_writer(self._path.parent, patience=10.0):
            steps = self.steps + more  # read again: a copy of the run folder may be spending too
            content = {"format": FORMAT, **asdict(self.spending), "steps": steps, "updated": time.strftime("%FT%T%z")}
            write_json(self._path, content)


def spendings(data: str | None = None) -> list[Spending]:
    """Everything spent, on one data set (its SHA-256) or on all of them."""
    return [
        Spending.parse(read_json(path), path)
        for path in sorted(budget_folder().glob("*/*.json"))
        if data is None or path.parent.name == data[:32]
    ]


def totals(spent: Sequence[Spending]) -> Iterator[tuple[Event, int]]:
    """Equal events taken together: what the accountant composes."""
    steps: dict[Event, int] = {}
    for each in spent:
        steps[each.event] = steps.get(each.event, 0) + each.steps
    yield from steps.items()


def grouped(spent: Sequence[Spending]) -> Mapping[str, list[Spending]]:
    """Spendings by data set."""
    found: dict[str, list[Spending]] = {}
    for each in spent:
        found.setdefault(each.data, []).append(each)
    return found
