"""The l_1 ball: the sum of all changes is at most eps, so a few pixels may change a lot."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trivet.errors import require
from trivet.methods import method
from trivet.threats.threat import ThreatModel


@method(title="l_1 ball", paper="Croce & Hein, ICML 2021; Tramer & Boneh, NeurIPS 2019", year=2021, legs="robust")
@dataclass(frozen=True)
class L1(ThreatModel):
    """S(x) = { x' in [0, 1]^D : ||x' - x||_1 <= eps }.

    `project` is the Euclidean projection onto ball and box together, exact up to one rounding of each pixel towards
    `x`. Projecting on the ball and clipping afterwards would give away much of the budget, because the few pixels
    that an l_1 attack changes are those that meet the box.

    Attributes:
        eps: the radius; not bounded by 1, since it sums over pixels.
        quantile: a step of `ascend` moves the pixels whose gradient is at or above this quantile of |gradient|
            (SLIDE's percentile). At 1 only the largest moves: the steepest ascent of this geometry, and a weak attack.
    """

    eps: float
    quantile: float = 0.99
    norm: ClassVar[str] = "L1"

    def __post_init__(self) -> None:
        require(0 <= self.eps < math.inf, f"eps={self.eps} must be a finite number, not negative.")
        require(0 <= self.quantile <= 1, f"quantile={self.quantile} must lie in [0, 1].")

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        target, origin = x_adv.flatten(1).double(), x.flatten(1).double()
        delta = project_l1_box(target - origin, origin, self.eps)
        # What float64 may have got wrong, which can be much beside a tiny eps, is scaled away.
        length = delta.abs().sum(1, keepdim=True)
        delta = delta * (self.eps * (1 - 1e-12) / length.clamp(min=1e-300)).clamp(max=1.0)
        nearest = (origin + delta).to(x.dtype)
        # Rounding to the nearest float may lengthen a change; the neighbour towards x is then the right one.
        longer = (nearest.double() - origin).abs() > delta.abs()
        point = torch.where(longer, torch.nextafter(nearest, x.flatten(1)), nearest).view_as(x)
        inside = self.contains(x_adv, x).view(-1, *[1] * (x.ndim - 1))
        return torch.where(inside, x_adv, point)

    def random_start(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A Gaussian perturbation, projected (the start of l_1-APGD)."""
        return self.project(x + torch.empty_like(x).normal_(generator=generator), x)

    def ascend(self, x_adv: Tensor, grad: Tensor, step: float | Tensor) -> Tensor:
        """Along the signs of the largest gradient entries, scaled to l_1 length 1 (SLIDE, Tramer & Boneh 2019).

        Pixels at the box with a gradient that points out of it are passed over: they cannot move.
        """
        blocked = ((x_adv >= 1) & (grad > 0)) | ((x_adv <= 0) & (grad < 0))
        size = grad.masked_fill(blocked, 0.0).abs().flatten(1)
        chosen = max(1, math.ceil(round((1 - self.quantile) * size.shape[1], 6)))
        least = size.topk(chosen, dim=1).values[:, -1:]
        moved = ((size >= least) & (size > 0)).to(grad.dtype)
        moved = moved / moved.sum(1, keepdim=True).clamp(min=1)
        return x_adv + step * grad.sign() * moved.view_as(grad)

    def contains(self, x_adv: Tensor, x: Tensor) -> Tensor:
        length = (x_adv.double() - x.double()).flatten(1).abs().sum(1)
        return (length <= self.eps) & ((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(1)


def project_l1_box(delta: Tensor, x: Tensor, eps: float) -> Tensor:
    """argmin ||d - delta||_2 over ||d||_1 <= eps and 0 <= x + d <= 1, by sorting (Croce & Hein 2021).

    The solution is d_i = sign(delta_i) min(max(|delta_i| - shift, 0), room_i), where room_i is the distance to the
    box on that side. Its l_1 norm falls piecewise linearly as `shift` grows; the kinks, where a pixel leaves the box
    or reaches zero, are sorted, and the piece on which the norm passes eps is solved exactly.

    Args:
        delta: [B, D], `x`: [B, D] in [0, 1]; float64 if the result is to be exact.
    """
    size = delta.abs()
    room = torch.where(delta > 0, 1 - x, x)
    free = torch.minimum(size, room)
    kinks, order = torch.cat((size - free, size), 1).sort(1)
    moving = torch.where(order < size.shape[1], 1.0, -1.0).to(delta.dtype).cumsum(1)
    fall = (moving[:, :-1] * kinks.diff(dim=1)).cumsum(1)
    length = free.sum(1, keepdim=True) - torch.nn.functional.pad(fall, (1, 0))
    piece = ((length > eps).sum(1, keepdim=True) - 1).clamp(min=0)
    excess = (length.gather(1, piece) - eps).clamp(min=0)
    shift = kinks.gather(1, piece) + excess / moving.gather(1, piece).clamp(min=1)
    inside = length[:, :1] <= eps
    shift = torch.where(inside, torch.zeros_like(shift), shift)
    return delta.sign() * torch.minimum((size - shift).clamp(min=0), room)
