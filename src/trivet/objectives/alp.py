"""Adversarial logit pairing (Kannan, Kurakin & Goodfellow, 2018), kept as the historical baseline it has become."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from trivet.data.dataset import Batch
from trivet.errors import require
from trivet.methods import method
from trivet.objectives.adversary import Adversary
from trivet.objectives.objective import Losses, Objective, Progress
from trivet.threats.losses import cross_entropy


@method(
    title="Adversarial logit pairing",
    paper="Kannan, Kurakin & Goodfellow, 2018",
    year=2018,
    legs="robust",
    note="historical: its ImageNet claim was broken by Engstrom, Ilyas & Athalye (2018)",
)
@dataclass(frozen=True)
class Alp(Adversary, Objective):
    """min_theta E[ (CE(z(x), y) + CE(z(x'), y)) / 2 + lam (1/K) ||z(x) - z(x')||_2^2 ], x' by PGD from a random start.

    The claimed ImageNet robustness did not last: with more attack steps the targeted accuracy fell to about 0.6 %
    (Engstrom et al.). Pulling logits together also makes them small, and small logits slow attacks down without
    stopping them.

    Attributes:
        lam: weight of the pairing, the mean over the K logits; 0.5 in the paper.
    """

    lam: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.lam >= 0, f"lam={self.lam} must not be negative.")

    def losses(self, model: nn.Module, batch: Batch, perturbed: Tensor, progress: Progress) -> Losses:
        clean, logits = model(batch.inputs), model(perturbed)
        half = 0.5 * (cross_entropy(clean, batch.labels) + cross_entropy(logits, batch.labels))
        pairing = (clean - logits).float().square().mean(1)
        return Losses(half + self.lam * pairing, {"pairing": pairing.detach()})
