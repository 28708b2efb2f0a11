"""The l_2 ball: the energy of a perturbation is at most eps^2."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trivet.errors import require
from trivet.methods import method
from trivet.threats.threat import ThreatModel, batch_norms


@method(title="l_2 ball", legs="robust")
@dataclass(frozen=True)
class L2(ThreatModel):
    """S(x) = { x' in [0, 1]^D : ||x' - x||_2 <= eps }.

    `project` goes to the ball first and then clips to [0, 1], as the field's attacks do: the result lies in both, and
    is the nearest point of S(x) wherever the box does not cut the ball. No point returned is further than `eps`
    (a float64) from `x`, to the last bit: what has to be scaled is scaled to a radius short of `eps` by as much as
    rounding D pixels can add.
    """

    eps: float
    norm: ClassVar[str] = "L2"

    def __post_init__(self) -> None:
        require(0 <= self.eps < math.inf, f"eps={self.eps} must be a finite number, not negative.")

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        delta = x_adv - x
        unit, pixels = torch.finfo(x.dtype).eps, math.sqrt(x[0].numel() if len(x) else 1)
        # A point that is inside already must come back unchanged, hence a radius for leaving and a lesser for scaling.
        outer = self.eps * (1 - 8 * unit)
        inner = max(self.eps * (1 - 16 * unit) - pixels * unit / 2, 0.0)
        length = torch.linalg.vector_norm(delta.flatten(1), dim=1, dtype=torch.float64).view_as(batch_norms(delta, 2))
        scale = (inner / length.clamp(min=1e-300)).to(x.dtype)
        return torch.where(length <= outer, x_adv, x + delta * scale).clamp_(0.0, 1.0)

    def random_start(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A uniformly random direction at distance eps, clipped to [0, 1]."""
        return self.project(x + 2 * self.eps * _unit(_gaussian(x, generator)), x)

    def ascend(self, x_adv: Tensor, grad: Tensor, step: float | Tensor) -> Tensor:
        """Along grad / ||grad||_2; where the gradient is zero there is no ascent direction, and the point stays."""
        return x_adv + step * _unit(grad)

    def contains(self, x_adv: Tensor, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm((x_adv.double() - x.double()).flatten(1), dim=1)
        return (length <= self.eps) & ((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(1)


def _unit(direction: Tensor) -> Tensor:
    """Each direction of a batch at length 1, zero where it is zero; first scaled so that no square underflows."""
    tiny = torch.finfo(direction.dtype).tiny
    scaled = direction / batch_norms(direction, torch.inf).clamp(min=tiny)
    return scaled / batch_norms(scaled, 2).clamp(min=0.5)


def _gaussian(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.empty_like(x).normal_(generator=generator)
