"""Projections: the nearest weight of an allowed kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor


class Projection(ABC):
    """A set of allowed weights of a layer (on a grid, of few non-zeros, in whole blocks), and the way onto it."""

    room: ClassVar[str] = "compression"

    @abstractmethod
    def project(self, weight: Tensor) -> Tensor:
        """The allowed tensor nearest to `weight` in l2, or, where it says so, a good one; detached, of equal shape.

        Idempotent up to rounding. Works on the whole weight of one layer: [O, I, …].
        """
