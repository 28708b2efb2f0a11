"""From what a source stores as labels (numbers or names) to a labelled dataset: the same rules for every source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trivet.data.dataset import Dataset, Splits
from trivet.errors import BadValue, require


class Part(NamedTuple):
    """One part of a dataset as a source stores it.

    Attributes:
        images: [N, C, H, W] uint8, or float32 in [0, 1].
        labels: [N] whole numbers counted from 0, or class names.
    """

    images: Tensor
    labels: Any


def labelled(
    train: Part, test: Part, *, title: str, classes: Sequence[str] | None = None, scale: float = 255.0
) -> Splits:
    """The two parts as datasets called `title`, with labels 0..K-1.

    Classes that are not given are the names found in the training part, in alphabetical order, or else the numbers
    "0", "1", … up to the greatest label of both parts.

    Raises:
        BadValue: labels that are neither whole numbers nor names, a name that is no class, and all that `Dataset`
            and `Splits` refuse.
    """
    names = [_label_array(train, f"{title}, training part"), _label_array(test, f"{title}, test part")]
    require(
        names[0].dtype.kind == names[1].dtype.kind or 0 in (names[0].size, names[1].size),
        f"{title}: labels are numbers in one part and names in the other; use one kind.",
    )
    if classes is None:
        classes = _classes_of(names, title)
    parts = [
        Dataset(part.images, _indices(labels, classes, title), tuple(classes), title, scale)
        for part, labels in zip((train, test), names, strict=True)
    ]
    return Splits(*parts)


def _label_array(part: Part, where: str) -> np.ndarray[Any, Any]:
    labels = np.asarray(part.labels)
    require(
        labels.shape == (len(part.images),), f"{where}: {len(part.images)} images but labels of shape {labels.shape}."
    )
    if labels.size == 0:
        return labels.astype(np.int64)
    if labels.dtype.kind == "u":
        require(int(labels.max()) < 2**63, f"{where}: a label of {labels.max()} is no class; number them from 0.")
    elif labels.dtype.kind not in "iU":
        raise BadValue(f"{where}: labels must be whole numbers or names, got {labels.dtype}; mend or drop the others.")
    return labels if labels.dtype.kind == "U" else labels.astype(np.int64)


def _classes_of(parts: list[np.ndarray[Any, Any]], title: str) -> tuple[str, ...]:
    train = parts[0]
    if train.dtype.kind == "U":
        return tuple(sorted({str(name) for name in train}))
    count = 1 + max((int(part.max()) for part in parts if part.size), default=0)
    require(
        count <= max(train.size, 1),
        f"{title}: labels run up to {count - 1}, but there are only {train.size} training records; number the "
        "classes from 0 without gaps, or name them.",
    )
    return tuple(map(str, range(max(count, 1))))


def _indices(labels: np.ndarray[Any, Any], classes: Sequence[str], title: str) -> Tensor:
    if labels.dtype.kind != "U":
        return torch.from_numpy(labels)
    position = {name: index for index, name in enumerate(classes)}
    unknown = sorted({str(name) for name in labels} - position.keys())
    require(
        not unknown, f"{title}: {', '.join(map(repr, unknown[:3]))} is none of the classes {', '.join(classes[:20])}."
    )
    return torch.tensor([position[str(name)] for name in labels], dtype=torch.int64)
