"""C&W: the smallest l_2 perturbation by optimisation (Carlini & Wagner, IEEE S&P 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trivet.methods import method
from trivet.threats.attack import Target
from trivet.threats.losses import margin
from trivet.threats.weighed import Weighed

_INSIDE = 1 - 1e-6  # atanh(±1) is infinite


@method(title="C&W", paper="Carlini & Wagner, IEEE S&P 2017", year=2017, legs="robust")
@dataclass(frozen=True)
class CarliniWagner(Weighed):
    """min over w of ||x' - x||_2^2 + c max(z_y - max_{j != y} z_j, -kappa),   x' = (tanh(w) + 1) / 2 in [0, 1].

    Adam on w, `steps` times for each of `searches` values of c (9 in the paper), at a rate of 0.01 as there. The
    threat must be an l_2 ball.
    """

    norm: ClassVar[str] = "L2"

    def descend(self, model: Target, x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        w = torch.atanh((2 * x - 1) * _INSIDE).detach().requires_grad_()
        optimizer = torch.optim.Adam([w], lr=self.lr)
        best, reach = x.clone(), torch.full_like(weight, torch.inf)
        for _ in range(self.steps):
            with torch.enable_grad():
                point = (w.tanh() + 1) / 2
                square = (point - x).flatten(1).square().sum(1)
                gap = torch.stack([-margin(model(point), y) for _ in range(self.samples)]).mean(0)
                loss = square + weight * gap.clamp_min(-self.kappa)
                (w.grad,) = torch.autograd.grad(loss.sum(), w)
            with torch.no_grad():
                proposed = point.detach()
                distance = square.detach().sqrt()
                closer = (gap.detach() < -self.kappa if self.kappa else gap.detach() < 0) & (distance < reach)
                if bool(closer.any()):
                    closer &= model.misclassifies(proposed, y)
                best[closer], reach[closer] = proposed[closer], distance[closer]
            optimizer.step()
        return best, reach
