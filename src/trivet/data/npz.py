"""NumPy archives of images and labels."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from trivet.data.dataset import Splits
from trivet.data.extras import in_one_line
from trivet.data.labels import Part, labelled
from trivet.errors import BadValue, TrivetError, require
from trivet.methods import method

Array = np.ndarray[Any, Any]

_KEYS = (
    ("x_train", "y_train", "x_test", "y_test"),  # Keras
    ("train_images", "train_labels", "test_images", "test_labels"),  # MedMNIST
)


@method(title="NumPy archive (.npz)")
def npz(
    path: Path,
    layout: Literal["NCHW", "NHWC", "NHW"] = "NCHW",
    scale: float | None = None,
    classes: tuple[str, ...] | None = None,
    title: str | None = None,
) -> Splits:
    """The arrays x_train, y_train, x_test, y_test (or train_images, train_labels, test_images, test_labels).

    Pickled objects in the archive are refused, never loaded.

    Args:
        path: the file.
        layout: the axes of the images; "NHW" has one channel. It is never guessed.
        scale: the pixel value that means 1. None: 255 for whole numbers, 1 for floats.
        classes: the names of classes 0, 1, …; None: their numbers, or the names that stand as labels.
        title: what figures are labelled with; None: the file's name.

    Raises:
        TrivetError: no such file, or not an archive.
        BadValue: a missing array, axes that do not fit `layout`, pixels outside [0, scale] or NaN, a bad label.
    """
    file = path.expanduser()
    arrays = _arrays(file)
    whole = all(arrays[part].dtype.kind in "iu" for part in (0, 2))
    unit = float(scale if scale is not None else 255 if whole else 1)
    require(0 < unit < float("inf"), f"scale={scale} must be a positive number.")
    train, test = (
        Part(_images(images, layout, unit, f"{file}, {name}"), labels[:, 0] if labels.shape[1:] == (1,) else labels)
        for images, labels, name in (
            (arrays[0], arrays[1], "training images"),
            (arrays[2], arrays[3], "test images"),
        )
    )
    return labelled(train, test, title=title or file.stem, classes=classes, scale=unit if whole else 1.0)


def _arrays(file: Path) -> tuple[Array, ...]:
    try:
        # NumPy leaves a file that it opened itself open when the archive is damaged.
        with file.open("rb") as handle:
            archive = np.load(handle, allow_pickle=False)
            single = not isinstance(archive, np.lib.npyio.NpzFile)
            require(not single, f"{file} is a single array; write several with numpy.savez.")
            for keys in _KEYS:
                if set(keys) <= set(archive.files):
                    return tuple(archive[key] for key in keys)
            raise BadValue(f"{file} needs the arrays {', '.join(_KEYS[0])}; it has: {', '.join(archive.files)}.")
    except FileNotFoundError:
        raise TrivetError(f"there is no file {file}; set path to an .npz file.") from None
    except BadValue:
        raise
    except (ValueError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise TrivetError(
            f"{file} cannot be read as an archive of plain arrays ({in_one_line(error)}); write it anew."
        ) from None


def _images(array: Array, layout: str, scale: float, where: str) -> Tensor:
    """[N, C, H, W]: whole numbers as uint8, floats divided by `scale` as float32."""
    require(
        array.ndim == len(layout),
        f"{where} have {array.ndim} axes, but layout={layout} has {len(layout)}; set layout to the axes they have.",
    )
    if layout == "NHW":
        array = array[:, None]
    elif layout == "NHWC":
        array = np.moveaxis(array, 3, 1)
    if array.dtype.kind in "iu":
        low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
        require(low >= 0 and high <= 255, f"{where} run from {low} to {high}; whole numbers must lie in 0 to 255.")
        return torch.from_numpy(np.ascontiguousarray(array, np.uint8))
    require(array.dtype.kind == "f", f"{where} are {array.dtype}; store whole numbers or floats.")
    return torch.from_numpy(np.ascontiguousarray(array / scale, np.float32))
