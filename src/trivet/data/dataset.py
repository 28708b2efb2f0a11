"""Datasets: decoded once into memory, served as floats in [0, 1], known by a fingerprint."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trivet.errors import require


@dataclass(frozen=True)
class Batch:
    """Some records.

    Attributes:
        inputs: [B, C, H, W] float32 in [0, 1].
        labels: [B] int64 in 0..K-1.
        index: [B] int64, the position of each record in its dataset.
    """

    inputs: Tensor
    labels: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Batch:
        return Batch(self.inputs.to(device), self.labels.to(device), self.index.to(device))

    def select(self, index: Tensor | slice | list[int]) -> Batch:
        """Some of its records."""
        return Batch(self.inputs[index], self.labels[index], self.index[index])


@dataclass(frozen=True)
class Dataset:
    """Labelled images in memory.

    Attributes:
        images: [N, C, H, W], uint8, or float32 already in [0, 1], with `scale` 1.
        labels: [N] int64 in 0..K-1, where K = len(classes).
        classes: the classes' names, in the order of the labels.
        name: what figures from it are labelled with, e.g. "CIFAR-10 (JPEG copy)".
        scale: an input is `images / scale`; 255 for ordinary pixels, 16 for the digits.

    Raises:
        BadValue: on shapes or types that do not fit, labels outside the classes, values outside [0, scale] or NaN.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    name: str
    scale: float = 255.0

    def __post_init__(self) -> None:
        where = f"dataset {self.name!r}"
        require(
            self.images.ndim == 4 and min(self.images.shape[1:]) > 0,
            f"{where}: images must be [N, C, H, W], got {tuple(self.images.shape)}.",
        )
        require(
            self.images.dtype in (torch.uint8, torch.float32),
            f"{where}: images must be uint8 or float32, got {self.images.dtype}; convert them first.",
        )
        require(
            self.labels.shape == self.images.shape[:1] and self.labels.dtype == torch.int64,
            f"{where}: labels must be int64 [{len(self.images)}], got {self.labels.dtype} {tuple(self.labels.shape)}.",
        )
        require(
            len(self.classes) > 0 and len(set(self.classes)) == len(self.classes),
            f"{where}: every class needs a name of its own, got {', '.join(self.classes) or 'none'}.",
        )
        require(
            0 < self.scale < math.inf and (self.scale == 1 or self.images.dtype == torch.uint8),
            f"{where}: scale={self.scale:g} must be positive, and 1 for float images, which lie in [0, 1] already.",
        )
        if len(self.labels):
            low, high = int(self.labels.min()), int(self.labels.max())
            require(
                low >= 0 and high < len(self.classes),
                f"{where}: labels run from {low} to {high}, but there are {len(self.classes)} classes (0 to "
                f"{len(self.classes) - 1}); relabel them from 0 or name all classes.",
            )
            smallest, largest = float(self.images.min()), float(self.images.max())
            # Written so that NaN, which compares false with everything, is refused too.
            require(
                smallest >= 0.0 and largest <= self.scale,
                f"{where}: pixel values run from {smallest:g} to {largest:g}, outside the declared range 0 to "
                f"{self.scale:g}; rescale them, and leave normalisation to the model.",
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one input."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def batch(self, index: Tensor) -> Batch:
        """The records at `index` [B] int64, as floats in [0, 1]."""
        # index_select makes the copy that is then divided in place: three times as fast as indexing and dividing.
        inputs = self.images.index_select(0, index).float().div_(self.scale)
        return Batch(inputs, self.labels.index_select(0, index), index)

    def batches(self, size: int) -> Iterator[Batch]:
        """All records in order, `size` at a time."""
        for index in torch.arange(len(self)).split(size):
            yield self.batch(index)

    def select(self, index: Tensor | slice) -> Dataset:
        """A dataset of some of the records."""
        return replace(self, images=self.images[index], labels=self.labels[index])

    def split(self, n: int, generator: torch.Generator) -> tuple[Dataset, Dataset]:
        """(rest, held): `n` records drawn at random without replacement are held out, the others stay.

        Both keep the order of the records. For a validation set: `split(5000, generator(seed, "validation"))`.
        """
        require(
            0 < n < len(self),
            f"dataset {self.name!r}: n={n} records to hold out must lie between 1 and {len(self) - 1}.",
        )
        held = torch.zeros(len(self), dtype=torch.bool)
        held[torch.randperm(len(self), generator=generator)[:n]] = True
        return self.select(~held), self.select(held)

    def digest(self) -> str:
        """SHA-256 over shapes, pixels and labels: what a privacy ledger or a claim knows the records by.

        Names are left out: the same records under another title are the same records. 0.03 s for MNIST.
        """
        sha = hashlib.sha256(repr((tuple(self.images.shape), str(self.images.dtype), float(self.scale))).encode())
        sha.update(self.images.contiguous().numpy().data)
        sha.update(self.labels.contiguous().numpy().data)
        return sha.hexdigest()


@dataclass(frozen=True)
class Splits:
    """A training and a test part, neither empty, with the same classes, input shape and range."""

    train: Dataset
    test: Dataset

    def __post_init__(self) -> None:
        for part, records in (("training", self.train), ("test", self.test)):
            require(len(records) > 0, f"the {part} part of {records.name!r} is empty; give it at least one record.")
        require(
            self.train.input_shape == self.test.input_shape and self.train.classes == self.test.classes,
            f"training and test parts differ: inputs {self.train.input_shape} and {self.test.input_shape}, "
            f"{self.train.num_classes} and {self.test.num_classes} classes.",
        )
        require(
            self.train.images.dtype == self.test.images.dtype and self.train.scale == self.test.scale,
            f"training and test parts differ: pixels are {self.train.images.dtype} up to {self.train.scale:g} and "
            f"{self.test.images.dtype} up to {self.test.scale:g}; give both in the same range.",
        )

    def limited(self, train: int | None = None, test: int | None = None) -> Splits:
        """The first `train` and the first `test` records (None: all of them), for quick trials.

        Raises:
            BadValue: a limit below 1, or above the number of records there are.
        """
        for field, limit, records in (("train_limit", train, self.train), ("test_limit", test, self.test)):
            require(
                limit is None or 1 <= limit <= len(records),
                f"{field}={limit} must lie between 1 and the {len(records)} records of {records.name!r}.",
            )
        return Splits(self.train.select(slice(train)), self.test.select(slice(test)))
