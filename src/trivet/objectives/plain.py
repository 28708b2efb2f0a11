"""Ordinary training: the cross-entropy on the inputs as they are, against which every other objective is compared."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from trivet.data.dataset import Batch
from trivet.methods import method
from trivet.objectives.objective import Losses, Objective, Progress
from trivet.threats.losses import cross_entropy


@method(title="Plain training")
@dataclass(frozen=True)
class Plain(Objective):
    """min_theta E CE(z(x), y). Nothing is promised about perturbed inputs.

    On CIFAR-10 such a WRN-28-10 keeps 0.00 % under AutoAttack at l_inf 8/255 (RobustBench's figure).
    """

    def losses(self, model: nn.Module, batch: Batch, perturbed: Tensor, progress: Progress) -> Losses:
        return Losses(cross_entropy(model(perturbed), batch.labels))
