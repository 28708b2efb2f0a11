"""SmoothAdv (Salman et al., NeurIPS 2019): adversarial training of the smoothed classifier."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from trivet.data.dataset import Batch
from trivet.errors import require
from trivet.methods import method
from trivet.models.modes import evaluating
from trivet.models.surrogate import Logits, surrogate
from trivet.objectives.adversary import Adversary
from trivet.objectives.gaussian import Gaussian
from trivet.objectives.objective import Losses, Objective, Progress
from trivet.objectives.views import log_mean_softmax
from trivet.threats.attack import input_gradient
from trivet.threats.losses import cross_entropy
from trivet.threats.threat import ThreatModel


@method(title="SmoothAdv", paper="Salman et al., NeurIPS 2019", year=2019, legs="robust")
@dataclass(frozen=True)
class SmoothAdv(Adversary, Objective):
    """min_theta E (1/m) sum_k CE(z(x + delta + eta_k), y), eta_k ~ N(0, sigma^2 I), where delta is an attack on the
    soft smoothed classifier under the same m draws:

        delta = argmax_{||delta||_2 <= eps, x + delta in [0, 1]} -log( (1/m) sum_k softmax z(x + delta + eta_k) )_y.

    `steps` normalised gradient steps of length 2 eps / steps from delta = 0, with the model frozen in eval mode;
    where the gradient is exactly zero, in a random direction. The mean is of probabilities, inside the logarithm: not
    of logits, nor of losses. The noise is drawn once a step and record; x + delta + eta is not clipped. All m
    noisy copies are trained on (`--train-multi-noise` in the authors' code).

    The paper's set is the l_2 ball. MNIST, eps 255/256, 10 steps, m = 4: average certified radius 0.932 / 1.687 /
    1.779 at sigma 0.25 / 0.5 / 1, against 0.911 / 1.558 / 1.618 for Gaussian augmentation (logs published by Jeong &
    Shin, n = 100 000).

    Attributes:
        sigma: standard deviation of the noise, in input units.
        samples: m, draws for each record and step; 1 to 8 in the paper.
        step_size: in input units; None means 2 eps / steps.
        eps_ramp: in the paper the radius grows over the first 10 of 90 to 150 epochs.
    """

    sigma: float = field(kw_only=True)
    samples: int = field(default=4, kw_only=True)
    eps_ramp: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.sigma >= 0, f"sigma={self.sigma} must not be negative.")
        require(self.samples >= 1, f"samples={self.samples} must be at least 1.")

    @property
    def step_length(self) -> float:
        return 2.0 * self.threat.eps / self.steps if self.step_size is None else self.step_size

    def start(self, threat: ThreatModel, batch: Batch, progress: Progress) -> Tensor:
        return batch.inputs

    def perturb(self, model: nn.Module, batch: Batch, progress: Progress) -> Tensor:
        """[B, samples, ...]: the attacked record under each of its draws of noise."""
        views = Gaussian(self.sigma, self.samples).perturb(model, batch, progress)
        with evaluating(model):
            smoothed = soft_smoothed(surrogate(model, progress.precision), batch.inputs, views)
            attacked = self.climb(smoothed, batch, progress)
        return views + (attacked - batch.inputs)[:, None]

    def climb(self, ask: Logits, batch: Batch, progress: Progress) -> Tensor:
        scale = min(1.0, progress.fraction / self.eps_ramp) if self.eps_ramp else 1.0
        threat, x = self.threat.scaled(scale), batch.inputs
        detour = torch.empty_like(x).normal_(generator=progress.generator("detour", x.device))
        point, loss = self.start(threat, batch, progress), self.inner_loss(ask, batch)
        for _ in range(self.steps):
            gradient, _, _ = input_gradient(ask, point, loss)
            stuck = (gradient == 0).flatten(1).all(1).view(-1, *[1] * (x.ndim - 1))
            direction = torch.where(stuck, detour, gradient)
            point = threat.project(threat.ascend(point, direction, scale * self.step_length), x)
        return point

    def losses(self, model: nn.Module, batch: Batch, perturbed: Tensor, progress: Progress) -> Losses:
        return Gaussian(self.sigma, self.samples).losses(model, batch, perturbed, progress)

    def inner_loss(self, model: Logits, batch: Batch) -> Callable[[Tensor], Tensor]:
        """-log of the mean probability: of logarithms of probabilities, which are logits too, the cross-entropy."""
        return lambda log_probabilities: cross_entropy(log_probabilities, batch.labels)


def soft_smoothed(model: Logits, x: Tensor, views: Tensor) -> Logits:
    """x' -> log( (1/V) sum_v softmax z(x' + eta_v) ) [B, K] under the noise eta_v = views_v - x, record by record."""

    def logits(point: Tensor) -> Tensor:
        moved = views + (point - x)[:, None]
        return log_mean_softmax(model(moved.flatten(0, 1)).unflatten(0, views.shape[:2]))

    return logits
