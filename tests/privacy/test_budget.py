"""Spent privacy is written down before it is spent, and stays spent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trivet.errors import TrivetError
from trivet.privacy import budget
from trivet.privacy.budget import Spender, Spending, budget_folder, spendings, totals
from trivet.privacy.mechanism import Event

EVENT = Event("poisson", 0.1, 1.5)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIVET_BUDGET", str(tmp_path / "budget"))
    return tmp_path / "budget"


def spending(run: str = "one", stage: str = "fit", data: str = "d" * 64, event: Event = EVENT) -> Spending:
    return Spending(data, "digits", 100, run, stage, "/runs/one", event, 0)


def test_a_step_is_on_disk_before_it_may_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    spender = Spender(spending(), most=50)
    for taken in range(50):
        spender.reserve()
        assert Spender(spending(), most=50).steps >= taken + 1
    assert spender.steps == 50  # nothing is reserved beyond what was planned


def test_slow_steps_are_reserved_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(budget.time, "monotonic", lambda: now[0])
    spender = Spender(spending(), most=50)
    for taken in range(5):
        spender.reserve()
        assert spender.steps == taken + 1
        now[0] += 2.0


def test_a_killed_process_has_spent_what_it_reserved(folder: Path) -> None:
    code = (
        "import os, signal\n"
        "from trivet.privacy.budget import Spender, Spending\n"
        "from trivet.privacy.mechanism import Event\n"
        f"spending = Spending('{'d' * 64}', 'digits', 100, 'one', 'fit', '/', Event('poisson', 0.1, 1.5), 0)\n"
        "spender = Spender(spending, 9)\n"
        "for _ in range(4): spender.reserve()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "TRIVET_BUDGET": str(folder)}, check=False)
    assert Spender(spending(), most=9).steps >= 4


def test_two_copies_of_a_run_add_up() -> None:
    first, second = Spender(spending(), most=10), Spender(spending(), most=10)
    for _ in range(10):
        first.reserve()
        second.reserve()
    assert first.steps >= 20


def test_a_lost_budget_is_made_up_for() -> None:
    spender = Spender(spending(), most=10)
    spender.at_least(7)
    assert spender.steps == 7
    spender.at_least(3)
    assert spender.steps == 7


def test_runs_and_stages_on_the_same_records_are_found_together(folder: Path) -> None:
    for run, stage, data in (("one", "fit", "a" * 64), ("one", "tune", "a" * 64), ("two", "fit", "a" * 64)):
        Spender(spending(run, stage, data), most=3).at_least(3)
    Spender(spending("three", "fit", "b" * 64, Event("poisson", 0.2, 1.0)), most=5).at_least(5)
    assert dict(totals(spendings("a" * 64))) == {EVENT: 9}
    assert len(spendings()) == 4
    assert spendings("c" * 64) == []


def test_a_damaged_file_is_an_error_and_not_a_fresh_start(folder: Path) -> None:
    Spender(spending(), most=3).at_least(3)
    (path,) = folder.glob("*/*.json")
    path.write_text('{"format": 1, "steps": ')
    with pytest.raises(TrivetError, match="damaged"):
        spendings()
    path.write_text(json.dumps({"format": 1, "steps": 3}))
    with pytest.raises(TrivetError, match="no record of spent privacy"):
        spendings()
    path.write_text(json.dumps({"format": 2}))
    with pytest.raises(TrivetError, match="another Trivet"):
        spendings()


def test_a_folder_one_may_not_write_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRIVET_BUDGET", str(tmp_path / "file"))
    with pytest.raises(TrivetError, match="set TRIVET_BUDGET"):
        Spender(spending(), most=3)


def test_it_is_kept_outside_the_run_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TRIVET_BUDGET")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert budget_folder() == tmp_path / "trivet" / "budget"
    monkeypatch.delenv("XDG_STATE_HOME")
    assert budget_folder() == Path.home() / ".local" / "state" / "trivet" / "budget"
