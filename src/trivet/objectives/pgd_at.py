"""PGD adversarial training (Madry et al., ICLR 2018): minimise the loss at the worst point PGD finds."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from trivet.data.dataset import Batch
from trivet.methods import method
from trivet.objectives.adversary import Adversary
from trivet.objectives.objective import Losses, Objective, Progress
from trivet.threats.losses import cross_entropy


@method(title="PGD adversarial training", paper="Madry et al., ICLR 2018", year=2018, legs="robust")
@dataclass(frozen=True)
class PgdAt(Adversary, Objective):
    """min_theta E CE(z(x'), y), where x' = `steps` PGD steps on CE from a random point of the threat set.

    The attack sees the model in eval mode (BatchNorm statistics frozen), the update runs in train mode.

    Published for CIFAR-10, l_inf 8/255, 10 steps of 2/255: 87.14 % clean, 44.04 % under AutoAttack where 47.04 %
    were reported (RobustBench). Robust accuracy peaks shortly after the first drop of the learning rate and then
    falls by several points (robust overfitting, Rice et al., ICML 2020): keep the checkpoint that is best on
    held-out records under PGD, not the last.
    """

    def losses(self, model: nn.Module, batch: Batch, perturbed: Tensor, progress: Progress) -> Losses:
        return Losses(cross_entropy(model(perturbed), batch.labels))
