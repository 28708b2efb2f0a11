"""What rounding may change: error terms that make bounds hold for numbers as computers add them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

Arithmetic = Literal["float32", "real"]
"""Which evaluation of a network a bound is about: `real` is the network as a function of real numbers, `float32` is
that and every evaluation in float32 besides, whatever the order of its sums."""

_SUBNORMAL = torch.finfo(torch.float32).tiny
"""Added for every operation: more than underflow, or flushing subnormals to zero, takes away."""

LARGEST = 1e30
"""Bounds beyond this count as unknown: evaluation in float32 might overflow."""


def gamma(operations: int, unit: float) -> float:
    """n u / (1 - n u): the relative error of a sum of n products in any order (Higham 2002, section 3.1)."""
    product = operations * unit
    return product / (1 - product) if product < 1 else math.inf


@dataclass(frozen=True)
class Rounding:
    """The errors of two computations: of the network's own evaluation, and of our bounds on it.

    Attributes:
        network: unit roundoff of the evaluation the bounds must hold for; 0 for real arithmetic.
        ours: unit roundoff of the arithmetic in which the bounds are computed.
    """

    network: float
    ours: float

    @classmethod
    def of(cls, arithmetic: Arithmetic, dtype: torch.dtype) -> Rounding:
        """The errors of bounds computed in `dtype`."""
        return cls(2.0**-24 if arithmetic == "float32" else 0.0, torch.finfo(dtype).eps / 2)

    def forward(self, operations: int) -> float:
        """Times sum |w| |x| + |b|: what rounding moves in an interval through a layer of so many operations."""
        # Ours twice, for centre and radius, and 24 for coefficients, ends and the last subtraction.
        return gamma(operations, self.network) + gamma(2 * operations + 24, self.ours)

    def backward(self, operations: int, summed: int) -> float:
        """The same for one step of a linear bound, whose `summed` terms are added up."""
        return gamma(operations, self.network) + gamma(2 * operations + summed + 64, self.ours)

    def least(self, operations: int) -> float:
        """An absolute error where numbers are too small for a relative one."""
        return (2 * operations + 24) * _SUBNORMAL
