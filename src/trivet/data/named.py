"""Where the datasets that everyone knows by name lie on this machine, and the check that they are whole."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from trivet.data.dataset import Splits
from trivet.errors import TrivetError, require


def named_folder(name: str, path: Path | None, hub: str) -> Path:
    """The folder of the dataset `name`: `path` if given, else $TRIVET_DATA/`name`.

    Where TRIVET_DATA is not set, ../shared/data takes its place if there is such a folder.

    Raises:
        TrivetError: there is no such folder; the message tells both ways to get the data, `hub` being the dataset's
            name on the Hugging Face hub.
    """
    root = os.environ.get("TRIVET_DATA")
    folder = path or (Path(root) if root else Path("../shared/data")) / name
    folder = folder.expanduser()
    if folder.is_dir():
        return folder
    if path is not None:
        raise TrivetError(f"there is no folder {folder}; set path to the folder with the Parquet files of {name}.")
    looked = f"in {folder}" if root else "because TRIVET_DATA is not set"
    raise TrivetError(
        f"{name} was not found {looked}; set TRIVET_DATA to the folder that holds {name}/, or load it from the hub "
        f"with {{name: hub, dataset: {hub}}}."
    )


def require_whole(
    splits: Splits, input_shape: tuple[int, int, int], classes: Sequence[str], train: int, test: int
) -> Splits:
    """`splits`, if it has the shape, the classes and the numbers of records that its name promises."""
    found = (splits.train.input_shape, splits.train.classes, len(splits.train), len(splits.test))
    require(
        found == (input_shape, tuple(classes), train, test),
        f"this is not {splits.train.name}: it has {found[2]} and {found[3]} records of shape {found[0]} in "
        f"{len(found[1])} classes, instead of {train} and {test} of shape {input_shape} in {len(classes)}; "
        "load your own data with {name: parquet}.",
    )
    return splits
