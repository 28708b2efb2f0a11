"""Patterns: which sets of weights of a layer may be kept, and the best one by given scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import floor
from typing import ClassVar

import torch
from torch import Tensor

from trivet.errors import require


class Pattern(ABC):
    """A rule that says which weights of a layer are kept or dropped together."""

    room: ClassVar[str] = "compression"

    @abstractmethod
    def keep(self, scores: Tensor, density: float) -> Tensor:
        """A boolean mask, shaped as `scores`, that keeps the share `density` with the largest scores.

        Scores may have any sign. The count is exact, ties included: of equal ones the first are dropped first.
        Without data-dependent branches: it works under `torch.func.vmap`.
        """


class UnitPattern(Pattern):
    """A pattern whose units are kept or dropped whole, each by itself: units of different layers can be compared."""

    @abstractmethod
    def units(self, scores: Tensor) -> Tensor:
        """The summed score [U] of each unit of a layer whose weights have `scores`."""

    @abstractmethod
    def spread(self, kept: Tensor, shape: torch.Size) -> Tensor:
        """From units kept [U] to the mask, of `shape`, of the weights they are made of."""

    def keep(self, scores: Tensor, density: float) -> Tensor:
        return self.spread(largest(self.units(scores), density), scores.shape)


def largest(scores: Tensor, density: float) -> Tensor:
    """Boolean [n]: all but the floor((1 - density) n) smallest of `scores` [n]; of equal ones the first go first."""
    require(0 < density <= 1, f"density={density} must lie in (0, 1].")
    # (1 - 0.9) * 10 is 0.9999… in floating point, and one weight is dropped all the same.
    drop = floor((1 - density) * scores.numel() + 1e-9)
    if not drop:
        return torch.ones_like(scores, dtype=torch.bool)
    edge = scores.kthvalue(drop).values
    below, equal = scores < edge, scores == edge
    return ~(below | (equal & (equal.cumsum(0) <= drop - below.sum())))
