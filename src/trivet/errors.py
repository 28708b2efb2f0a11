"""The one kind of error a user meets: a sentence that says what is wrong, where, and the mend."""

from __future__ import annotations


class TrivetError(Exception):
    """Something the user can mend.

    The command line prints the message alone and exits with status 2; a traceback means a bug in Trivet.
    The message is one sentence (or two) naming what is wrong, where it stands, and what to do about it.
    """


class BadValue(TrivetError, ValueError):
    """An argument, a recipe field or a piece of data outside what is allowed."""


def require(condition: bool, message: str) -> None:
    """Raise `BadValue(message)` unless `condition` holds; unlike `assert`, it survives `python -O`."""
    if not condition:
        raise BadValue(message)
