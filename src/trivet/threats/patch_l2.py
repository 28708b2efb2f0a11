"""The l_2 ball in every patch: each row of an image may change by its own eps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trivet.errors import require
from trivet.methods import method
from trivet.threats.threat import ThreatModel


@method(title="l_2 ball in every patch", paper="Li & Li, ICLR 2025", year=2025, legs="robust")
@dataclass(frozen=True)
class PatchL2(ThreatModel):
    """S(x) = { x' in [0, 1]^D : ||x'_p - x_p||_2 <= eps for every patch p }; a patch is a row [W] of an image.

    `project` and `contains` keep the promises of the l_2 ball, patch by patch. `ascend` moves every patch by the full
    step; where a patch has no gradient, because no filter sees it, the patch stays. The paper's own choice of the set
    is not known to us; this one is ours.
    """

    eps: float
    norm: ClassVar[str] = "patch L2"

    def __post_init__(self) -> None:
        require(0 <= self.eps < math.inf, f"eps={self.eps} must be a finite number, not negative.")

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        delta = x_adv - x
        unit, pixels = torch.finfo(x.dtype).eps, math.sqrt(x.shape[-1])
        # As for the l_2 ball: what is inside comes back unchanged, hence two radii.
        outer = self.eps * (1 - 8 * unit)
        inner = max(self.eps * (1 - 16 * unit) - pixels * unit / 2, 0.0)
        length = torch.linalg.vector_norm(delta, dim=-1, keepdim=True, dtype=torch.float64)
        scale = (inner / length.clamp(min=1e-300)).to(x.dtype)
        return torch.where(length <= outer, x_adv, x + delta * scale).clamp_(0.0, 1.0)

    def random_start(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A uniformly random direction in every patch at distance eps, clipped to [0, 1]."""
        direction = torch.empty_like(x).normal_(generator=generator)
        return self.project(x + 2 * self.eps * _unit(direction), x)

    def ascend(self, x_adv: Tensor, grad: Tensor, step: float | Tensor) -> Tensor:
        return x_adv + step * _unit(grad)

    def contains(self, x_adv: Tensor, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x_adv.double() - x.double(), dim=-1)
        return (length <= self.eps).flatten(1).all(1) & ((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(1)


def _unit(direction: Tensor) -> Tensor:
    """Each patch at length 1, zero where it is zero; first scaled so that no square underflows."""
    tiny = torch.finfo(direction.dtype).tiny
    scaled = direction / direction.abs().amax(-1, keepdim=True).clamp(min=tiny)
    return scaled / torch.linalg.vector_norm(scaled, dim=-1, keepdim=True).clamp(min=0.5)
