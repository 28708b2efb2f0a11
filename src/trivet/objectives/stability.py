"""Stability training (Li et al., NeurIPS 2019): predict the same under noise as without it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from trivet.data.dataset import Batch
from trivet.errors import require
from trivet.methods import method
from trivet.objectives.gaussian import Gaussian
from trivet.objectives.objective import Losses, Progress
from trivet.objectives.views import view_logits
from trivet.threats.losses import cross_entropy


@method(title="Stability training", paper="Li, Chen, Wang & Carin, NeurIPS 2019", year=2019, legs="robust")
@dataclass(frozen=True)
class Stability(Gaussian):
    """min_theta E[ CE(z(x), y) + lam E_{eta ~ N(0, sigma^2 I)} sum_c -F_c(x) log F_c(x + eta) ],   F = softmax z.

    The clean prediction is the target of the noisy one, by cross-entropy; the gradient flows through both. Clean and
    noisy inputs go through the model in two passes. Noise is fresh in every step and is not clipped.

    What the evidence shows: MNIST, average certified radius 0.915 / 1.572 / 1.634 at sigma 0.25 / 0.5 / 1, against
    0.911 / 1.558 / 1.618 for Gaussian augmentation (logs published by Jeong & Shin, n = 100 000): hardly more.

    Attributes:
        lam: weight of the cross-entropy between the predictions; 2 in Jeong & Shin's comparison. 0 is plain training.
    """

    lam: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.lam >= 0, f"lam={self.lam} must not be negative.")

    def losses(self, model: nn.Module, batch: Batch, perturbed: Tensor, progress: Progress) -> Losses:
        clean = view_logits(model, batch.inputs[:, None]).squeeze(1)
        natural = cross_entropy(clean, batch.labels)
        agreement = soft_cross_entropy(clean, view_logits(model, perturbed))
        return Losses(
            natural + self.lam * agreement, {"natural": natural.detach(), "soft_cross_entropy": agreement.detach()}
        )


def soft_cross_entropy(clean: Tensor, noisy: Tensor) -> Tensor:
    """(1/V) sum_v sum_c -softmax(clean)_c log softmax(noisy_v)_c [B], of logits [B, K] and [B, V, K]."""
    return -(clean.softmax(1)[:, None] * noisy.log_softmax(2)).sum(2).mean(1)


def mean_divergence(clean: Tensor, noisy: Tensor) -> Tensor:
    """(1/V) sum_v KL( softmax(clean) || softmax(noisy_v) ) [B], of logits [B, K] and [B, V, K]; in nats.

    It is `soft_cross_entropy` less the entropy of the clean prediction, and so zero where nothing changes.
    """
    log_p = clean.log_softmax(1)[:, None]
    return (log_p.exp() * (log_p - noisy.log_softmax(2))).sum(2).mean(1)
