"""The trade-off loss of the Integrated Approach (Li, Wang & Xin, 2020): clean and adversarial loss, weighted."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from trivet.data.dataset import Batch
from trivet.errors import require
from trivet.methods import method
from trivet.objectives.adversary import Adversary
from trivet.objectives.objective import Losses, Objective, Progress
from trivet.threats.losses import cross_entropy


@method(title="Trade-off loss", paper="Li, Wang & Xin, 2020", year=2020, legs="robust")
@dataclass(frozen=True)
class TradeOff(Adversary, Objective):
    """min_theta E[ (alpha CE(z(x), y) + beta CE(z(x'), y)) / (alpha + beta) ], x' by PGD from a random start.

    The authors' code does not divide: its steps are alpha + beta = 9 times as long against weight decay, and part of
    the sparsity it reports may come from that. `normalize=False` reproduces it. alpha = 0 is PGD training.

    Attributes:
        alpha, beta: weights of the clean and of the adversarial loss; 1 and 8 in the authors' code.
        normalize: divide by their sum.
    """

    alpha: float = 1.0
    beta: float = 8.0
    normalize: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.alpha >= 0, f"alpha={self.alpha} must not be negative.")
        require(self.beta > 0, f"beta={self.beta} must be positive.")

    def losses(self, model: nn.Module, batch: Batch, perturbed: Tensor, progress: Progress) -> Losses:
        natural = cross_entropy(model(batch.inputs), batch.labels)
        adversarial = cross_entropy(model(perturbed), batch.labels)
        total = self.alpha * natural + self.beta * adversarial
        scale = self.alpha + self.beta if self.normalize else 1.0
        return Losses(total / scale, {"natural": natural.detach(), "adversarial": adversarial.detach()})
