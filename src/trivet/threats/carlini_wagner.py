"""C&W: the smallest l_2 perturbation by optimisation (Carlini & Wagner, IEEE S&P 2017)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from trivet.errors import require
from trivet.methods import method
from trivet.threats.attack import Attack, Target
from trivet.threats.losses import margin

_INSIDE = 1 - 1e-6  # atanh(±1) is infinite


@method(title="C&W", paper="Carlini & Wagner, IEEE S&P 2017", year=2017, legs="robust")
@dataclass(frozen=True)
class CarliniWagner(Attack):
    """min over w of ||x' - x||_2^2 + c max(z_y - max_{j != y} z_j, -kappa),   x' = (tanh(w) + 1) / 2 in [0, 1].

    Adam on w, `steps` times for each of `searches` values of c: halved where an adversarial point was found, ten times
    as much while none was, and bisected between, point by point. The nearest adversarial point of all counts, and
    breaks the threat if it lies within its radius. The threat must be an l_2 ball.

    Attributes:
        steps: Adam's steps for each c.
        searches: values of c; 9 in the paper.
        lr: of Adam; 0.01 in the paper.
        c: the first one.
        kappa: the margin by which another class must win.
        samples: forward passes averaged per gradient, for randomised models.
    """

    steps: int = 100
    searches: int = 9
    lr: float = 0.01
    c: float = 0.01
    kappa: float = 0.0
    samples: int = 1

    def __post_init__(self) -> None:
        require(self.threat.norm == "L2", f"threat={self.threat.norm}: C&W minimises the l_2 norm; choose l2.")
        for name in ("steps", "searches", "samples"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("lr", "c"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive.")
        require(self.kappa >= 0, f"kappa={self.kappa} must not be negative.")

    def search(self, model: Target, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.threat.project(self.nearest(model, x, y)[0], x)

    def nearest(self, model: Target, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest adversarial points [B, ...] found, and their l_2 distance [B]; x and infinity where none was."""
        return weighed(partial(self._descend, model, x, y), x, self.c, self.searches)

    def _descend(self, model: Target, x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
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


def weighed(
    descend: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor, first: float, searches: int
) -> tuple[Tensor, Tensor]:
    """The nearest points [B, ...] that `descend` found with any of `searches` weights of the classes, and their
    distance [B].

    `descend` takes weights [B] and returns points and distances, infinite where it found none. The weight of an input
    is `first`, then halved where a point was found, ten times as much while none was, and bisected between.
    """
    weight = torch.full((len(x),), first, dtype=x.dtype, device=x.device)
    low, high = torch.zeros_like(weight), torch.full_like(weight, torch.inf)
    best, reach = x.clone(), torch.full_like(weight, torch.inf)
    for _ in range(searches):
        found, distance = descend(weight)
        closer = distance < reach
        best[closer], reach[closer] = found[closer], distance[closer]
        won = distance.isfinite()
        high, low = torch.where(won, weight, high), torch.where(won, low, weight)
        # Ten times as much while nothing has been found, as in the authors' code.
        weight = torch.where(high.isfinite(), (low + high) / 2, 10 * weight)
    return best, reach
