"""Progress is shown to people and not to files."""

from __future__ import annotations

import io
import sys

import pytest

from trivet import display


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_nothing_is_shown_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    with display.progress("work", 3) as advance:
        advance(2, note="half")
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_a_terminal_sees_task_count_rate_and_note(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    with display.progress("work", 3) as advance:
        for _ in range(3):
            advance(1, note="well")
    shown = terminal.getvalue()
    assert all(words in shown for words in ("work", "3/3", "/s", "left", "well"))
