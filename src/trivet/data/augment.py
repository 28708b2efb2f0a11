"""Label-preserving random changes of a batch: seeded, vectorised, and never out of [0, 1].

Each record is changed by draws of its own, so an augmentation mixes no records (what private training relies on).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from trivet.errors import require
from trivet.methods import method


class Augmentation(ABC):
    """A random map of inputs [B, C, H, W] in [0, 1] to inputs of the same shape and range."""

    room: ClassVar[str] = "data"

    @abstractmethod
    def __call__(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """The changed inputs: a function of `inputs`, which stay as they are, and of draws from `generator`."""


@method(title="Random crop", paper="He et al., CVPR 2016", year=2016)
@dataclass(frozen=True)
class RandomCrop(Augmentation):
    """Pad by `padding` black pixels on each side, then cut out the original size at a uniformly random place.

    Equal in law to a shift by up to `padding` pixels each way, black where nothing was; padding 4 is the custom
    for CIFAR-10 (section 4.2 of the paper).
    """

    padding: int = 4

    def __post_init__(self) -> None:
        require(self.padding >= 0, f"padding={self.padding} must not be negative.")

    def __call__(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        batch, channels, height, width = inputs.shape
        if batch == 0:  # Poisson sampling draws such batches
            return inputs
        places = torch.randint(0, 2 * self.padding + 1, (2, batch), generator=generator, device=generator.device)
        top, left = places.to(inputs.device)
        padded = F.pad(inputs, (self.padding,) * 4)
        # Every row of every crop is `width` consecutive numbers in memory: one gather of rows, a quarter of the
        # time of indexing pixels.
        stride = width + 2 * self.padding
        plane = stride * (height + 2 * self.padding)
        planes = torch.arange(batch * channels, device=inputs.device).view(batch, channels, 1) * plane
        rows = torch.arange(height, device=inputs.device) * stride
        starts = planes + (top * stride + left).view(batch, 1, 1) + rows
        crops = padded.flatten().unfold(0, width, 1).index_select(0, starts.flatten())
        return crops.view(batch, channels, height, width)


@method(title="Random horizontal flip", paper="Krizhevsky et al., NeurIPS 2012", year=2012)
@dataclass(frozen=True)
class HorizontalFlip(Augmentation):
    """Mirror each image left to right with `probability`. Not for data where that changes the class (digits)."""

    probability: float = 0.5

    def __post_init__(self) -> None:
        require(0 <= self.probability <= 1, f"probability={self.probability} must lie in [0, 1].")

    def __call__(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        flipped = torch.rand(len(inputs), generator=generator, device=generator.device) < self.probability
        return torch.where(flipped.to(inputs.device)[:, None, None, None], inputs.flip(3), inputs)
