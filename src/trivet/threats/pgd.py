"""Projected gradient descent (Madry et al., ICLR 2018), the universal first-order attack; FGSM is its first step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from trivet.errors import require
from trivet.methods import method
from trivet.models.surrogate import Logits
from trivet.threats.attack import Attack, Target, input_gradient
from trivet.threats.losses import LOSSES, AttackLoss
from trivet.threats.threat import ThreatModel


def ascend(
    model: Logits,
    x: Tensor,
    start: Tensor,
    loss: Callable[[Tensor], Tensor],
    *,
    threat: ThreatModel,
    steps: int,
    step_size: float,
    samples: int = 1,
) -> Tensor:
    """x_{k+1} = P_S( x_k + step_size * direction(grad loss(z(x_k))) ), `steps` times from `start`; the last iterate.

    `loss` maps logits [B, K] to what is raised, [B].
    """
    point = start
    for _ in range(steps):
        gradient, _, _ = input_gradient(model, point, loss, samples)
        point = threat.project(threat.ascend(point, gradient, step_size), x)
    return point.detach()


def _raise(loss: AttackLoss, labels: Tensor, logits: Tensor) -> Tensor:
    return loss(logits, labels)


@method(title="PGD", paper="Madry et al., ICLR 2018", year=2018, legs="robust")
@dataclass(frozen=True)
class PGD(Attack):
    """Ascend the loss by `steps` normalised gradient steps from a random point of the set; keep the last iterate.

    Attributes:
        steps: gradient steps of each restart.
        step_size: in input units; None means 2.5 eps / steps, so that every point of the ball can be reached.
        restarts: independent starts; later ones attack only what still stands.
        loss: "ce", "margin" or "dlr".
        random_start: start from a random point of the set instead of `x`.
        samples: forward passes averaged per gradient, for randomised models.
    """

    steps: int = 40
    step_size: float | None = None
    restarts: int = 1
    loss: Literal["ce", "margin", "dlr"] = "ce"
    random_start: bool = True
    samples: int = 1

    def __post_init__(self) -> None:
        require(self.steps >= 1, f"steps={self.steps} must be at least 1.")
        require(self.restarts >= 1, f"restarts={self.restarts} must be at least 1.")
        require(self.samples >= 1, f"samples={self.samples} must be at least 1.")
        require(self.step_size is None or self.step_size >= 0, f"step_size={self.step_size} must not be negative.")

    def search(self, model: Target, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        step_size = 2.5 * self.threat.eps / self.steps if self.step_size is None else self.step_size
        best, open_ = x, torch.arange(len(x), device=x.device)
        for restart in range(self.restarts):
            clean, labels = x[open_], y[open_]
            start = self.threat.random_start(clean, generator) if self.random_start else clean
            found = ascend(
                model,
                clean,
                start,
                partial(_raise, LOSSES[self.loss], labels),
                threat=self.threat,
                steps=self.steps,
                step_size=step_size,
                samples=self.samples,
            )
            best = found if restart == 0 else best.index_copy(0, open_, found)
            if restart + 1 < self.restarts:
                open_ = open_[~model.misclassifies(found, labels)]
                if not len(open_):
                    break
        return best


@method(title="FGSM", paper="Goodfellow et al., ICLR 2015", year=2015, legs="robust")
def fgsm(threat: ThreatModel) -> PGD:
    """One full step from the clean input: x' = P(x + eps * direction(grad))."""
    return PGD(threat, steps=1, step_size=threat.eps, random_start=False)


@method(title="FGSM with a random start", paper="Wong, Rice & Kolter, ICLR 2020", year=2020, legs="robust")
def random_fgsm(threat: ThreatModel) -> PGD:
    """One step of 1.25 eps from a uniformly random point, projected back: the attack inside fast training."""
    return PGD(threat, steps=1, step_size=1.25 * threat.eps)
