"""Binary weights: one scale for a layer, and a sign for each weight (Rastegari et al., ECCV 2016)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trivet.compression.projection import Projection
from trivet.methods import method


@method(title="Binary weights", paper="Rastegari et al., ECCV 2016", year=2016, legs="small")
@dataclass(frozen=True)
class Binary(Projection):
    """s sign(w) with s = mean|w|, the nearest point of s {-1, +1} over all s. One bit a weight.

    Weights that are exactly zero have been masked: they stay zero, and do not count for the scale.
    """

    def project(self, weight: Tensor) -> Tensor:
        size = weight.detach().abs()
        scale = size.sum() / size.count_nonzero().clamp_min(1)
        return scale * weight.detach().sign() + 0.0  # no negative zeros: on disk they are another value
