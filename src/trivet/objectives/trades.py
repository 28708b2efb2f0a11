"""TRADES (Zhang et al., ICML 2019): trade accuracy for a prediction that does not change around the input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trivet.data.dataset import Batch
from trivet.errors import require
from trivet.methods import method
from trivet.models.surrogate import Logits
from trivet.objectives.adversary import Adversary, start_beside
from trivet.objectives.objective import Losses, Objective, Progress
from trivet.threats.losses import cross_entropy, kl_divergence
from trivet.threats.threat import ThreatModel


@method(title="TRADES", paper="Zhang et al., ICML 2019", year=2019, legs="robust")
@dataclass(frozen=True)
class Trades(Adversary, Objective):
    """min_theta E[ CE(z(x), y) + beta max_{x' in S(x)} KL( p(x) || p(x') ) ].

    The inner problem: `steps` PGD steps on the divergence from x + 0.001 N(0, I), in eval mode, p(x) held fixed. The
    outer gradient flows through both p(x) and p(x'). Clean and perturbed inputs go through the model in two passes,
    so that BatchNorm normalises each by its own statistics, as in the authors' code (which passes the clean inputs
    twice, with the same values).

    Published for CIFAR-10, WRN-34-10, beta 6, l_inf 0.031 (a little under 8/255): 84.92 % clean, 56.43 to 56.61 %
    under PGD-20 (the authors), 53.08 % under AutoAttack (RobustBench).

    Attributes:
        beta: weight of the divergence, the paper's 1 / lambda; 6 for CIFAR-10, 1 for MNIST. 0 is plain training.
    """

    beta: float = 6.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta >= 0, f"beta={self.beta} must not be negative.")

    def start(self, threat: ThreatModel, batch: Batch, progress: Progress) -> Tensor:
        return start_beside(threat, batch, progress)

    def inner_loss(self, model: Logits, batch: Batch) -> Callable[[Tensor], Tensor]:
        with torch.no_grad():
            clean = model(batch.inputs)
        return lambda logits: kl_divergence(logits, clean)

    def losses(self, model: nn.Module, batch: Batch, perturbed: Tensor, progress: Progress) -> Losses:
        clean = model(batch.inputs)
        natural = cross_entropy(clean, batch.labels)
        divergence = kl_divergence(model(perturbed), clean)
        return Losses(
            natural + self.beta * divergence,
            {"natural": natural.detach(), "divergence": divergence.detach()},
        )
