"""The l_inf ball: every pixel may change by at most eps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trivet.errors import require
from trivet.methods import method
from trivet.threats.threat import ThreatModel


@method(title="l_inf ball", legs="robust")
@dataclass(frozen=True)
class Linf(ThreatModel):
    """S(x) = { x' in [0, 1]^D : max_i |x'_i - x_i| <= eps }.

    No point returned is further than `eps` (a float64) from `x`, to the last bit: the interval of every pixel is
    narrowed by one rounding unit of the dtype at 1 (2^-24 for float32), more than rounding its ends can add. The
    naive clamp of `x_adv - x` overshoots by half an ulp on about half of all pixels.
    """

    eps: float
    norm: ClassVar[str] = "Linf"

    def __post_init__(self) -> None:
        require(0 <= self.eps <= 1, f"eps={self.eps} must lie in [0, 1]: inputs are images in [0, 1].")

    def bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the greatest allowed value of every pixel."""
        inner = max(self.eps - torch.finfo(x.dtype).eps / 2, 0.0)
        return (x - inner).clamp_(min=0.0), (x + inner).clamp_(max=1.0)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        lower, upper = self.bounds(x)
        return torch.clamp(x_adv, lower, upper)

    def random_start(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.empty_like(x).uniform_(-self.eps, self.eps, generator=generator)
        return self.project(x + noise, x)

    def ascend(self, x_adv: Tensor, grad: Tensor, step: float | Tensor) -> Tensor:
        return x_adv + step * grad.sign()

    def contains(self, x_adv: Tensor, x: Tensor) -> Tensor:
        inside = ((x_adv.double() - x.double()).abs() <= self.eps) & (x_adv >= 0) & (x_adv <= 1)
        return inside.flatten(1).all(1)
