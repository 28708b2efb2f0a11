"""MART (Wang et al., ICLR 2020): adversarial training that attends to the records the model gets wrong."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trivet.data.dataset import Batch
from trivet.errors import require
from trivet.methods import method
from trivet.objectives.adversary import Adversary, start_beside
from trivet.objectives.objective import Losses, Objective, Progress
from trivet.threats.losses import cross_entropy
from trivet.threats.threat import ThreatModel


@method(
    title="MART",
    paper="Wang et al., ICLR 2020",
    year=2020,
    legs="robust",
    note="judge it by margin attacks: cross-entropy PGD flatters it",
)
@dataclass(frozen=True)
class Mart(Adversary, Objective):
    """min_theta E[ BCE(p(x'), y) + beta KL( p(x) || p(x') ) (1 - p_y(x)) ], with the boosted cross-entropy

        BCE(p, y) = -log p_y - log(1 - max_{k != y} p_k).

    x' = `steps` PGD steps on CE from x + 0.001 N(0, I), in eval mode. Constants as in the authors' code: 1.0001 and
    1.0000001 for the two ones, 1e-12 inside the logarithms. The gradient flows through p(x) and p(x').

    What the evidence shows: the released CIFAR-10 model (500 000 extra images) was reported at 65.04 % under PGD and
    keeps 56.29 % under AutoAttack, 87.50 % clean (RobustBench). The gap is wide because MART flattens the
    cross-entropy that PGD climbs; attacks on the margin are needed to judge it.

    Attributes:
        beta: weight of the divergence; 5 (ResNet-18) or 6 (wide networks) in the paper.
    """

    beta: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta >= 0, f"beta={self.beta} must not be negative.")

    def start(self, threat: ThreatModel, batch: Batch, progress: Progress) -> Tensor:
        return start_beside(threat, batch, progress)

    def losses(self, model: nn.Module, batch: Batch, perturbed: Tensor, progress: Progress) -> Losses:
        y = batch.labels[:, None]
        log_p = model(batch.inputs).log_softmax(1)
        logits = model(perturbed)
        p, q = log_p.exp(), logits.softmax(1)
        strongest_other = q.scatter(1, y, 0.0).amax(1)
        boosted = cross_entropy(logits, batch.labels) - torch.log(1.0001 - strongest_other + 1e-12)
        divergence = (p * (log_p - torch.log(q + 1e-12))).sum(1)
        doubt = 1.0000001 - p.gather(1, y).squeeze(1)
        return Losses(
            boosted + self.beta * divergence * doubt,
            {"boosted": boosted.detach(), "divergence": divergence.detach()},
        )
