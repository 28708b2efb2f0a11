"""What C&W and EAD share: the nearest adversarial point, by weighing its distance against the classes."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trivet.errors import require
from trivet.threats.attack import Attack, Target


@dataclass(frozen=True)
class Weighed(Attack):
    """min over x' of distance(x', x) + c max(z_y - max_{j != y} z_j, -kappa), for `searches` values of c.

    c is halved where an adversarial point was found, ten times as much while none was, and bisected between, point by
    point. The nearest adversarial point of all counts, and breaks the threat if it lies within its radius.

    Attributes:
        steps: of the descent for each c.
        searches: values of c.
        lr: of the descent.
        c: the first one.
        kappa: the margin by which another class must win.
        samples: forward passes averaged per gradient, for randomised models.
    """

    norm: ClassVar[str]

    steps: int = 100
    searches: int = 9
    lr: float = 0.01
    c: float = 0.01
    kappa: float = 0.0
    samples: int = 1

    def __post_init__(self) -> None:
        require(
            self.threat.norm == self.norm,
            f"threat={self.threat.norm}: {type(self).__name__} minimises the {self.norm.replace('L', 'l_')} norm; "
            f"choose {self.norm.lower()}.",
        )
        for name in ("steps", "searches", "samples"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("lr", "c"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive.")
        require(self.kappa >= 0, f"kappa={self.kappa} must not be negative.")

    def search(self, model: Target, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.threat.project(self.nearest(model, x, y)[0], x)

    def nearest(self, model: Target, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest adversarial points [B, ...] found, and their distance [B]; x and infinity where none was."""
        weight = torch.full((len(x),), self.c, dtype=x.dtype, device=x.device)
        low, high = torch.zeros_like(weight), torch.full_like(weight, torch.inf)
        best, reach = x.clone(), torch.full_like(weight, torch.inf)
        for _ in range(self.searches):
            found, distance = self.descend(model, x, y, weight)
            closer = distance < reach
            best[closer], reach[closer] = found[closer], distance[closer]
            won = distance.isfinite()
            high, low = torch.where(won, weight, high), torch.where(won, low, weight)
            # Ten times as much while nothing has been found, as in the authors' code.
            weight = torch.where(high.isfinite(), (low + high) / 2, 10 * weight)
        return best, reach

    @abstractmethod
    def descend(self, model: Target, x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest adversarial points met with these c [B], and their distance; x and infinity where none was."""
