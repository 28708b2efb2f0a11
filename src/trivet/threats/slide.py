"""SLIDE, sparse l_1 descent: PGD in the l_1 ball that moves a few pixels at a time (Tramer & Boneh, NeurIPS 2019)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from trivet.errors import require
from trivet.methods import method
from trivet.threats.attack import Attack, Target
from trivet.threats.l1 import L1
from trivet.threats.losses import LOSSES, AttackLoss
from trivet.threats.pgd import ascend
from trivet.threats.threat import batch_norms


@method(title="SLIDE", paper="Tramer & Boneh, NeurIPS 2019", year=2019, legs="robust")
@dataclass(frozen=True)
class Slide(Attack):
    """x <- P( x + gamma e / ||e||_1 ), e_i = sign(g_i) where |g_i| is at or above the q-quantile of |g|, else 0.

    g is the gradient of the loss; entries that push a pixel further out of the box are zero before the quantile is
    taken. Each restart begins at Laplace noise of l_1 length eps. P is the exact projection on ball and box together
    (see `L1`), where the published attack projects on the ball and clips afterwards; the authors' code keeps one
    coordinate too many in that projection and leaves the ball, which cannot happen here.

    Attributes:
        steps: gradient steps of each restart.
        gamma: l_1 length of a step; None means 2.5 eps / steps. Published: 1 for training on MNIST at eps 10 with 10
            steps, 0.5 for evaluation, 2 for CIFAR-10.
        quantiles: q is drawn uniformly between the two, once for each restart. Published: 0.99 alone (MNIST), 0.8 to
            0.99 (CIFAR-10). At (1, 1) one pixel moves in each step: steepest ascent, a weak attack.
        restarts: independent starts; later ones attack only what still stands.
        random_start: begin at Laplace noise instead of `x`.
        loss: what is raised; published: the margin.
    """

    threat: L1
    steps: int = 40
    gamma: float | None = None
    quantiles: tuple[float, float] = (0.8, 0.99)
    restarts: int = 1
    random_start: bool = True
    loss: Literal["ce", "margin", "dlr"] = "margin"

    def __post_init__(self) -> None:
        require(isinstance(self.threat, L1), f"SLIDE knows the l_1 geometry, not {self.threat.norm}; give it l1.")
        require(self.steps >= 1, f"steps={self.steps} must be at least 1.")
        require(self.restarts >= 1, f"restarts={self.restarts} must be at least 1.")
        require(self.gamma is None or self.gamma >= 0, f"gamma={self.gamma} must not be negative.")
        low, high = self.quantiles
        require(0 <= low <= high <= 1, f"quantiles={[low, high]} must be two ascending numbers in [0, 1].")

    def search(self, model: Target, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        low, high = self.quantiles
        gamma = 2.5 * self.threat.eps / self.steps if self.gamma is None else self.gamma
        best, open_ = x.clone(), torch.arange(len(x), device=x.device)
        for _ in range(self.restarts):
            clean, labels = x[open_], y[open_]
            share = low + (high - low) * torch.rand((), generator=generator, device=x.device).item()
            threat = replace(self.threat, quantile=share)
            found = ascend(
                model,
                clean,
                laplace_start(threat, clean, generator) if self.random_start else clean,
                partial(_raise, LOSSES[self.loss], labels),
                threat=threat,
                steps=self.steps,
                step_size=gamma,
            )
            best[open_] = found
            if self.restarts > 1:
                open_ = open_[~model.misclassifies(found, labels)]
                if not len(open_):
                    break
        return best


def laplace_start(threat: L1, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Laplace noise scaled to l_1 length eps, in the box."""
    size = torch.empty_like(x).exponential_(generator=generator)
    noise = torch.where(torch.rand(x.shape, generator=generator, device=x.device) < 0.5, -size, size)
    return threat.project(x + threat.eps * noise / batch_norms(noise, 1).clamp(min=1e-12), x)


def _raise(loss: AttackLoss, labels: Tensor, logits: Tensor) -> Tensor:
    return loss(logits, labels)
