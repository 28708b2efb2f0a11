"""Another source made to fit: some of its classes only, images of another size, dark and bright exchanged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trivet.data.dataset import Dataset, Splits
from trivet.errors import FieldError, require
from trivet.methods import build, method

_AT_ONCE = 2000  # images resized together


@method(title="Adapted source")
def adapted(
    of: dict[str, Any] | str,
    classes: tuple[str | int, ...] | None = None,
    size: int | None = None,
    invert: bool = False,
) -> Splits:
    """The records of another source, changed one by one by fixed rules: for transfer from one task to another.

    Resized images are floats, interpolated linearly (over all pixels that a new one covers), then inverted: x -> 1 - x.
    Records of other classes are dropped from both parts; the order of the rest stays. A budget of privacy knows
    records by their pixels, so these are other records to it than those of the source.

    Args:
        of: the source, as `data` of a recipe has it, without limits.
        classes: the names of the classes to keep, in the order of the new labels 0, 1, …; None: all.
        size: height and width of the images in pixels; None: as they are.
        invert: whether to exchange dark and bright.

    Raises:
        BadValue: a class that the source has not, one named twice, or a size below 1.
    """
    require(size is None or size >= 1, f"size={size} must be at least 1.")
    try:
        found: Splits = build("data", of, expects=Splits)
    except FieldError as error:
        raise FieldError(("of", *error.path), error.text) from None
    names = None if classes is None else tuple(map(str, classes))
    said = (names and " ".join(names), size and f"{size}x{size}", invert and "inverted")
    title = ", ".join([found.train.name, *(each for each in said if each)])
    train, test = (_changed(part, names, size, invert) for part in (found.train, found.test))
    return Splits(replace(train, name=title), replace(test, name=title))


def _changed(records: Dataset, classes: tuple[str, ...] | None, size: int | None, invert: bool) -> Dataset:
    if classes is not None:
        records = _of_classes(records, classes)
    if size is not None:
        images = [_resized(records.batch(part).inputs, size) for part in torch.arange(len(records)).split(_AT_ONCE)]
        records = replace(records, images=torch.cat(images), scale=1.0)
    if invert:
        brightest = torch.tensor(records.scale).to(records.images.dtype)
        records = replace(records, images=brightest - records.images)
    return records


def _of_classes(records: Dataset, classes: tuple[str, ...]) -> Dataset:
    unknown = [name for name in classes if name not in records.classes]
    require(
        not unknown and len(set(classes)) == len(classes) > 0,
        f"classes={list(classes)} must name different classes of {records.name}: {', '.join(records.classes)}.",
    )
    place = torch.full((len(records.classes),), -1)
    place[[records.classes.index(name) for name in classes]] = torch.arange(len(classes))
    labels = place[records.labels]
    kept = labels >= 0
    return replace(records, images=records.images[kept], labels=labels[kept], classes=classes)


def _resized(inputs: Tensor, size: int) -> Tensor:
    """[B, C, H, W] in [0, 1] to [B, C, size, size] in [0, 1]."""
    return F.interpolate(inputs, (size, size), mode="bilinear", antialias=True).clamp_(0.0, 1.0)
