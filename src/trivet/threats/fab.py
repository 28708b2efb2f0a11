"""FAB: the fast adaptive boundary attack, which looks for the nearest misclassified point (Croce & Hein, ICML 2020)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor

from trivet.errors import require
from trivet.methods import method
from trivet.threats.attack import Attack, Target, fooled, input_gradient
from trivet.threats.hyperplane import Norm, to_hyperplane
from trivet.threats.targeting import Tries, try_again, try_classes
from trivet.threats.threat import batch_norms

Boundary = Callable[[Target, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Points [B, ...], labels [B] and classes aimed at [B] to the linearised decision boundary to go to: z_j - z_y [B] and
its gradient [B, ...]."""

_P = {"Linf": torch.inf, "L2": 2.0, "L1": 1.0}
_DUAL = {"Linf": 1.0, "L2": 2.0, "L1": torch.inf}


@dataclass(frozen=True)
class BoundaryAttack(Attack):
    """What the untargeted and the targeted attack share.

    Attributes:
        steps: iterations of each restart.
        alpha_max: greatest weight of the projection of `x` itself, which pulls the iterate back towards `x`.
        overshoot: factor on every step (eta), so that the boundary is crossed and not merely met.
        backward: how far towards `x` an adversarial iterate is drawn (beta): its perturbation is multiplied by this.
    """

    steps: int = 100
    alpha_max: float = 0.1
    overshoot: float = 1.05
    backward: float = 0.9

    def __post_init__(self) -> None:
        norm = self.threat.norm
        require(norm in _P, f"FAB knows the l_inf, l_2 and l_1 geometry, not {norm}; choose linf, l2 or l1.")
        require(self.steps >= 1, f"steps={self.steps} must be at least 1.")
        require(0 <= self.alpha_max <= 1, f"alpha_max={self.alpha_max} must lie in [0, 1].")
        require(self.overshoot >= 1, f"overshoot={self.overshoot} must be at least 1.")
        require(0 < self.backward <= 1, f"backward={self.backward} must lie in (0, 1].")

    @abstractmethod
    def _closest(self, model: Target, x: Tensor, y: Tensor, generator: torch.Generator | None, radius: float) -> Tensor:
        """The nearest adversarial points [B, ...] found, `x` where none was; points within `radius` are near enough."""

    def search(self, model: Target, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.threat.project(self._closest(model, x, y, generator, self.threat.eps), x)

    def nearest(
        self, model: Target, x: Tensor, y: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """The nearest misclassified points [B, ...] found at any distance, and their distance [B] from `x`.

        Where none was found, the point is `x` and the distance infinite. The radius of `threat` plays no part but in
        the random starts of restarts.
        """
        point = self._closest(model, x, y, generator, 0.0)
        distance = batch_norms(point - x, _P[self.threat.norm]).flatten()
        return point, distance.masked_fill(~model.misclassifies(point, y), torch.inf)

    def _approach(
        self,
        model: Target,
        boundary: Boundary,
        radius: float,
        start: Callable[[Tensor], Tensor],
        x: Tensor,
        y: Tensor,
        aim: Tensor,
        owner: Tensor,
    ) -> Tries:
        """One restart: step across the boundary, draw back towards `x`, again and again; the nearest successes."""
        closest, won = x.clone(), torch.zeros_like(y, dtype=torch.bool)
        distance = torch.full_like(y, torch.inf, dtype=x.dtype)
        row, point = torch.arange(len(x), device=x.device), start(x)
        for _ in range(self.steps):
            gap, normal = boundary(model, point, y, aim)
            point = self._cross(point, x, gap, normal)
            with torch.no_grad():
                adversarial = fooled(model(point), y)
            reach = batch_norms(point - x, _P[self.threat.norm]).flatten()
            closer = adversarial & (reach < distance[row])
            closest[row[closer]], distance[row[closer]] = point[closer], reach[closer]
            near = (closer & (reach <= radius * (1 + 1e-6))).nonzero().squeeze(1)
            if len(near):
                inside = self.threat.project(point[near], x[near])
                verified = self.succeeds(model, inside, x[near], y[near])
                near = near[verified]
                closest[row[near]], won[row[near]] = inside[verified], True
            back = self.backward * (point - x)
            point = torch.where(adversarial.view(-1, *[1] * (x.ndim - 1)), x + back, point)
            if len(near):
                kept = (~torch.isin(owner, owner[near])).nonzero().squeeze(1)
                row, point, x, y, aim, owner = (each[kept] for each in (row, point, x, y, aim, owner))
                if not len(row):
                    break
        return Tries(closest, won, -distance)

    def _cross(self, point: Tensor, x: Tensor, gap: Tensor, normal: Tensor) -> Tensor:
        """The next iterate: a mean of the projections of the iterate and of `x`, both carried past the boundary."""
        norm = cast(Norm, self.threat.norm)
        here, origin, w = point.flatten(1), x.flatten(1), normal.flatten(1)
        step = to_hyperplane(here, w, gap, norm)
        leap = to_hyperplane(origin, w, gap + torch.linalg.vecdot(w, origin - here), norm)
        near, far = (batch_norms(d, _P[norm]).clamp(min=1e-8) for d in (step, leap))
        alpha = (near / (near + far)).clamp(max=self.alpha_max)
        ahead = (here + self.overshoot * step).lerp(origin + self.overshoot * leap, alpha)
        return ahead.clamp_(0.0, 1.0).view_as(x)


@method(title="FAB", paper="Croce & Hein, ICML 2020", year=2020, legs="robust", name="fab")
@dataclass(frozen=True)
class FAB(BoundaryAttack):
    """Untargeted FAB: each step goes to the nearest of the K - 1 linearised decision boundaries.

    It takes K backward passes a step; `fab_t` takes one, and suits many classes.

    Attributes:
        restarts: the first starts from `x`, the others from random points of the ball of radius eps / 2.
    """

    restarts: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.restarts >= 1, f"restarts={self.restarts} must be at least 1.")

    def _closest(self, model: Target, x: Tensor, y: Tensor, generator: torch.Generator | None, radius: float) -> Tensor:
        half = self.threat.scaled(0.5)
        anywhere = partial(half.random_start, generator=generator)
        starts: list[Callable[[Tensor], Tensor]] = [_here, *[anywhere] * (self.restarts - 1)]
        boundary = partial(_nearest_boundary, _DUAL[self.threat.norm])
        return try_again(x, y, [partial(self._approach, model, boundary, radius, start) for start in starts])


@method(title="FAB-T", paper="Croce & Hein, ICML 2020", year=2020, legs="robust", name="fab_t")
@dataclass(frozen=True)
class FABT(BoundaryAttack):
    """Targeted FAB: goes to the boundary with one class at a time, each of the `targets` most likely wrong ones."""

    targets: int = 9

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.targets >= 1, f"targets={self.targets} must be at least 1.")

    def _closest(self, model: Target, x: Tensor, y: Tensor, generator: torch.Generator | None, radius: float) -> Tensor:
        climb = partial(self._approach, model, _aimed_boundary, radius, _here)
        return try_classes(model, x, y, self.targets, climb)


def _here(x: Tensor) -> Tensor:
    return x


def _aimed_boundary(model: Target, point: Tensor, y: Tensor, aim: Tensor) -> tuple[Tensor, Tensor]:
    """z_aim - z_y and its gradient."""

    def lead(logits: Tensor) -> Tensor:
        return (logits.gather(1, aim[:, None]) - logits.gather(1, y[:, None])).squeeze(1)

    normal, gap, _ = input_gradient(model, point, lead)
    return gap, normal


def _nearest_boundary(dual: float, model: Target, point: Tensor, y: Tensor, _aim: Tensor) -> tuple[Tensor, Tensor]:
    """z_j - z_y and its gradient for the class j whose linearised boundary is nearest: least |z_j - z_y| / ||grad||."""
    point = point.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(point)
        columns = [torch.autograd.grad(column.sum(), point, retain_graph=True)[0] for column in logits.unbind(1)]
    gradients = torch.stack(columns, 1)  # [B, K, ...]
    row = torch.arange(len(y), device=y.device)
    normals = gradients - gradients[row, y].unsqueeze(1)
    gaps = (logits - logits.gather(1, y[:, None])).detach()
    lengths = torch.linalg.vector_norm(normals.flatten(2), ord=dual, dim=2)
    distance = (gaps.abs() / lengths.clamp(min=1e-12)).scatter(1, y[:, None], torch.inf)
    nearest = distance.argmin(1)
    return gaps[row, nearest], normals[row, nearest]
