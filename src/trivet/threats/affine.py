"""Affine attacks: a share of each type of perturbation at once (Tramer & Boneh, NeurIPS 2019)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from trivet.errors import require
from trivet.methods import method
from trivet.threats.attack import Attack, Target, fooled, input_gradient
from trivet.threats.losses import LOSSES, cross_entropy
from trivet.threats.rotation_translation import RotationTranslation, worst_transform
from trivet.threats.threat import ThreatModel


@method(title="Affine", paper="Tramer & Boneh, NeurIPS 2019", year=2019, legs="robust")
@dataclass(frozen=True)
class Affine(Attack):
    """Search { clip(T(x) + sum_i d_i) : T in S_RT at w_0 of its limits, ||d_i||_i <= w_i eps_i, sum_i w_i = 1 }.

    The set holds every member of the union (one weight is 1) and mixtures that lie in none: what this attack leaves is
    no bound on the accuracy under the union, and is reported beside it. For a margin that is convex in the perturbation
    (a linear model) mixing gains nothing; for others it may.

    The norm attacks take turns: step t moves d_(t mod m) by the gradient at the sum of all, `steps` times each. A
    rotation comes first: the worst of `draws` within the scaled limits, about which the norm attacks then search (the
    authors repeat the norm attack for each transform). Weights are drawn uniformly from the simplex for each restart,
    one draw for all records (the authors draw for each record too). Of all restarts the best point is kept: a
    misclassified one first, then the one with the highest cross-entropy. The sum is rounded once, to the inputs' dtype.

    Attributes:
        steps: gradient steps of each member, 2.5 w_i eps_i / steps long.
        restarts: draws of the weights.
        weights: use these, one for each member, instead of drawing; they must sum to 1.
        loss: what the steps raise.
        draws: random transforms to choose from.
        random_start: start every d_i at a random point of its ball instead of 0.
    """

    steps: int = 20
    restarts: int = 5
    weights: tuple[float, ...] = ()
    loss: Literal["ce", "margin", "dlr"] = "margin"
    draws: int = 10
    random_start: bool = True
    outside: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("steps", "restarts", "draws"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1.")
        members, weights = self.threat.members, self.weights
        require(len(members) >= 2, f"threat={self.threat.norm} must be a union of several threats to be mixed.")
        rotations = sum(isinstance(member, RotationTranslation) for member in members)
        require(
            rotations < 2, f"threat holds {rotations} rotation_translation sets; an affine attack mixes one at most."
        )
        require(rotations < len(members), "threat must hold a norm ball, too, to be mixed with.")
        if weights:
            right = len(weights) == len(members) and min(weights) >= 0 and math.isclose(sum(weights), 1, abs_tol=1e-9)
            require(right, f"weights={list(weights)} must be {len(members)} numbers that sum to 1, none negative.")

    def search(self, model: Target, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        best, most = x.clone(), torch.full(y.shape, -torch.inf, device=x.device)
        for _ in range(self.restarts):
            weights = self.weights or _simplex(len(self.threat.members), x.device, generator)
            point = self._restart(model, x, y, weights, generator)
            with torch.no_grad():
                logits = model(point)
            value = cross_entropy(logits, y).float().masked_fill(fooled(logits, y), torch.inf)
            better = value > most
            best = torch.where(better.view(-1, *[1] * (x.ndim - 1)), point, best)
            most = torch.maximum(most, value)
        return best

    def succeeds(self, model: Target, x_adv: Tensor, x: Tensor, y: Tensor) -> Tensor:
        # Every d_i was put in its ball by the member's own projection, so only the box and the verdict are left to see.
        return ((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(1) & model.misclassifies(x_adv, y)

    def _restart(
        self, model: Target, x: Tensor, y: Tensor, weights: tuple[float, ...], generator: torch.Generator | None
    ) -> Tensor:
        centre, balls = x, []
        for member, weight in zip(self.threat.members, weights, strict=True):
            share: ThreatModel = member.scaled(weight)
            if isinstance(share, RotationTranslation):
                tries = (share.random_moves(x, generator) for _ in range(self.draws))
                centre = worst_transform(model, share, x, y, tries)
            else:
                balls.append(share)
        points = [ball.random_start(centre, generator) if self.random_start else centre for ball in balls]
        for step in range(self.steps * len(balls)):
            turn = step % len(balls)
            mixed = _mixed(centre, points)
            gradient, _, _ = input_gradient(model, mixed, lambda logits: LOSSES[self.loss](logits, y))
            moved = balls[turn].ascend(points[turn], gradient, 2.5 * balls[turn].eps / self.steps)
            points[turn] = balls[turn].project(moved, centre)
        return _mixed(centre, points)


def _mixed(centre: Tensor, points: list[Tensor]) -> Tensor:
    """centre + sum_i (point_i - centre), clipped; the one point itself where there is but one that moved."""
    moved = points[0]
    for point in points[1:]:
        moved = moved + (point - centre)
    return moved.clamp(0.0, 1.0)


def _simplex(count: int, device: torch.device, generator: torch.Generator | None) -> tuple[float, ...]:
    """Uniform on { w >= 0, sum w = 1 }: exponentials divided by their sum."""
    draws = torch.empty(count, dtype=torch.float64, device=device).exponential_(generator=generator)
    return tuple((draws / draws.sum()).tolist())
