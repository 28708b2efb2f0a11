"""Ternary weights: a scale for a layer, a sign for the large weights, and zeros (Li, Zhang & Liu, 2016)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trivet.compression.projection import Projection
from trivet.methods import method


@method(title="Ternary weights", paper="Li, Zhang & Liu, 2016", year=2016, legs="small")
@dataclass(frozen=True)
class Ternary(Projection):
    """The nearest point of s {-1, 0, +1} over all s. Under two bits a weight, and zeros for nothing.

    With |w| sorted downwards and c_k the sum of the k largest, k* = argmax c_k^2 / k: the k* largest are kept, at the
    scale c_k* / k*. `rule="author"` is what Binary-Relax's code does instead: it keeps |w| >= 0.7 mean|w|, and divides
    the scale's sum by the number of all weights, which makes it too small by the share of those kept.

    Attributes:
        rule: "exact", or "author" for reproduction.
    """

    rule: Literal["exact", "author"] = "exact"

    def project(self, weight: Tensor) -> Tensor:
        weight = weight.detach()
        size = weight.abs()
        if self.rule == "author":
            kept = size >= (0.7 * size.mean()).clamp_max(100)
            return (size * kept).mean() * weight.sign() * kept
        largest = size.flatten().sort(descending=True).values
        sums = largest.cumsum(0, dtype=torch.float64)
        counts = torch.arange(1, len(sums) + 1, device=sums.device)
        best = (sums.square() / counts).argmax()
        # Of equal weights at the edge all are kept: the objective is the same to first order, and the rule simpler.
        kept = (size >= largest[best]) & (size > 0)
        scale = (size * kept).sum() / kept.count_nonzero().clamp_min(1)
        return scale * weight.sign() * kept + 0.0  # no negative zeros: on disk they are another value
