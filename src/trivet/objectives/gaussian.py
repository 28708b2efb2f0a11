"""Training on inputs with Gaussian noise, the base classifier of randomized smoothing (Cohen et al., ICML 2019)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trivet.data.dataset import Batch
from trivet.errors import require
from trivet.methods import method
from trivet.objectives.objective import Losses, Objective, Progress
from trivet.threats.losses import cross_entropy


@method(title="Gaussian noise augmentation", paper="Cohen, Rosenfeld & Kolter, ICML 2019", year=2019, legs="robust")
@dataclass(frozen=True)
class Gaussian(Objective):
    """min_theta E_{x, y} E_{eta ~ N(0, sigma^2 I)} CE(z(x + eta), y), with fresh noise in every step.

    The noisy inputs leave [0, 1] and are not clipped, exactly as the smoothed classifier will see them. Certify with
    the sigma that was trained on. By itself the network is not robust; its smoothed version has the certificates.
    MNIST at sigma 0.5: average certified radius 1.56, against 1.66 with consistency regularization, n = 100 000
    (logs published by Jeong & Shin, NeurIPS 2020).

    Attributes:
        sigma: standard deviation of the noise, in input units.
        samples: draws for each record and step; their losses are averaged. 1 in the paper.
    """

    sigma: float
    samples: int = 1

    def __post_init__(self) -> None:
        require(self.sigma >= 0, f"sigma={self.sigma} must not be negative.")
        require(self.samples >= 1, f"samples={self.samples} must be at least 1.")

    def perturb(self, model: nn.Module, batch: Batch, progress: Progress) -> Tensor:
        """[B, samples, ...]: the noisy views of each record."""
        x = batch.inputs
        noise = torch.empty(len(x), self.samples, *x.shape[1:], dtype=x.dtype, device=x.device)
        noise.normal_(generator=progress.generator("noise", x.device))
        return x[:, None] + self.sigma * noise

    def losses(self, model: nn.Module, batch: Batch, perturbed: Tensor, progress: Progress) -> Losses:
        views = cross_entropy(model(perturbed.flatten(0, 1)), batch.labels.repeat_interleave(self.samples))
        return Losses(views.view(-1, self.samples).mean(1))
