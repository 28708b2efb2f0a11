"""Conductance levels: the values a memristor can hold, on either side of zero, and none at zero (Yuan et al., 2019)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trivet.compression.projection import Projection
from trivet.errors import require
from trivet.methods import method


@method(title="Conductance levels", paper="Yuan et al., ISLPED 2019", year=2019, legs="small")
@dataclass(frozen=True)
class Levels(Projection):
    """alpha {±q_0, …, ±q_(L - 1)}, q_i evenly spaced from 1 / ratio to 1, L = 2^(bits - 1); zeros stay zeros.

    A weight is a sign and bits - 1 bits of magnitude. A device has no state of conductance zero: zero is no level, and
    weights that are zero have been pruned and are not mapped. alpha and the assignment alternate, at most 20 times:
    q <- the nearest level of |w| / alpha, then alpha = <|w|, q> / <q, q>. The end is a local optimum.

    Attributes:
        bits: of a weight, its sign included.
        ratio: of the largest to the smallest conductance; 10 in the paper (1 to 10 MOhm).
    """

    bits: int = 5
    ratio: float = 10.0

    def __post_init__(self) -> None:
        require(2 <= self.bits <= 12, f"bits={self.bits} must lie between 2 and 12.")
        require(1 < self.ratio < float("inf"), f"ratio={self.ratio} must be above 1.")

    @property
    def top(self) -> int:
        """The number of the largest level, from 0."""
        return int(2 ** (self.bits - 1)) - 1

    def level(self, numbers: Tensor) -> Tensor:
        """q of each level's number."""
        return (1 + (self.ratio - 1) * numbers / self.top) / self.ratio

    def numbered(self, size: Tensor) -> Tensor:
        """The number of the level nearest to each size >= 0, in units of alpha; halves down."""
        return ((size * self.ratio - 1) / (self.ratio - 1) * self.top - 0.5).ceil().clamp(0, self.top)

    def project(self, weight: Tensor) -> Tensor:
        weight = weight.detach()
        alpha, numbers = self.assign(weight)
        return alpha * self.level(numbers) * weight.sign() + 0.0

    @torch.no_grad()
    def assign(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """alpha, and the number of every weight's level, shaped as the weight (that of a zero means nothing)."""
        size, present = weight.abs(), weight != 0
        alpha = self._exact(size[present].unique())
        if alpha is not None:
            return alpha, self.numbered(size / alpha)
        # At first the levels' middle meets the weights' mean.
        mean = size.sum() / present.sum().clamp_min(1)
        alpha, numbers = mean / self.level(torch.tensor(self.top / 2.0)), torch.full_like(size, -1)
        for _ in range(20):
            before, numbers = numbers, self.numbered(size / alpha).nan_to_num(0.0)
            if torch.equal(numbers, before):
                break
            q = self.level(numbers) * present
            alpha = (size * q).sum() / q.square().sum().clamp_min(torch.finfo(q.dtype).tiny)
        return alpha, numbers

    def _exact(self, sizes: Tensor) -> Tensor | None:
        """The alpha on whose levels all `sizes` [n], ascending and different, lie already; None if there is none."""
        if not 0 < len(sizes) <= self.top + 1:
            return None
        for number in torch.arange(self.top, -1, -1, device=sizes.device):
            alpha = sizes[-1] / self.level(number)
            if torch.allclose(alpha * self.level(self.numbered(sizes / alpha)), sizes, rtol=1e-5, atol=0.0):
                return alpha
        return None
