"""The one kind of error a user meets: a sentence that says what is wrong, where, and the mend."""

from __future__ import annotations


class TrivetError(Exception):
    """Something the user can mend.

    The command line prints the message alone and exits with status 2; a traceback means a bug in Trivet.
    The message is one sentence (or two) naming what is wrong, where it stands, and what to do about it.
    """


class BadValue(TrivetError, ValueError):
    """An argument, a recipe field or a piece of data outside what is allowed."""


Path = tuple[str | int, ...]


class FieldError(BadValue):
    """A `BadValue` at a known place of a nested specification, e.g. ("stages", 0, "fit", "epochs")."""

    def __init__(self, path: Path, text: str) -> None:
        self.path, self.text = path, text
        super().__init__(f"{dotted(path)}: {text}" if path else text)


def dotted(path: Path) -> str:
    """A path as people write it: stages[0].fit.epochs."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


def require(condition: bool, message: str) -> None:
    """Raise `BadValue(message)` unless `condition` holds; unlike `assert`, it survives `python -O`."""
    if not condition:
        raise BadValue(message)
