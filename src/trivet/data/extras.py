"""Packages that only some users need: asked for in one sentence when missing, quoted in one line when they fail."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from trivet.errors import TrivetError


@contextmanager
def extra(name: str, need: str) -> Iterator[None]:
    """Imports in this block come from the optional dependencies `name` of pyproject.toml.

        with extra("parquet", "reading Parquet needs pyarrow and pillow"):
            import pyarrow

    Raises:
        TrivetError: the package is not installed; the message is `need` and the command that installs it.
    """
    try:
        yield
    except ModuleNotFoundError:
        raise TrivetError(f"{need}: pip install 'trivet[{name}]'.") from None


def in_one_line(error: Exception) -> str:
    """What another package says went wrong, to stand within a message of ours."""
    return " ".join(str(error).split())
