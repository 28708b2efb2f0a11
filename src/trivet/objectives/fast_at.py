"""Fast adversarial training (Wong, Rice & Kolter, ICLR 2020): one gradient step from a random start is enough."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from trivet.data.dataset import Batch
from trivet.methods import method
from trivet.objectives.adversary import Adversary
from trivet.objectives.objective import Losses, Objective, Progress
from trivet.threats.losses import cross_entropy


@method(title="Fast adversarial training", paper="Wong, Rice & Kolter, ICLR 2020", year=2020, legs="robust")
@dataclass(frozen=True)
class FastAt(Adversary, Objective):
    """min_theta E CE(z(x'), y), where x' = P( x0 + 1.25 eps sign grad CE(z(x0), y) ) from a random x0 of the set.

    Two forward-backward passes a step instead of PGD's many. Published for CIFAR-10, l_inf 8/255, 15 epochs: 86.06 %
    clean, 46.06 % under PGD-50 with 10 restarts (the authors), 83.34 % and 43.21 % under AutoAttack (RobustBench).

    Known failure, catastrophic overfitting: within an epoch or two the accuracy under PGD falls to about 0 while
    that under FGSM stays high. Larger steps, a start at x and long training invite it. The loss cannot see it; it
    shows as accuracy under FGSM minus accuracy under PGD above 0.2 on held-out records, for the training loop and
    the audit to watch.

    Attributes:
        steps: always 1.
        step_size: in input units; None means 1.25 eps.
        attack_mode: the model's mode during the attack. "train" is what the authors' code does: the gradient then
            depends on batch statistics, and the attack's pass moves BatchNorm's running ones.
    """

    steps: int = field(default=1, init=False)
    attack_mode: Literal["eval", "train"] = "eval"

    @property
    def step_length(self) -> float:
        return 1.25 * self.threat.eps if self.step_size is None else self.step_size

    def perturb(self, model: nn.Module, batch: Batch, progress: Progress) -> Tensor:
        if self.attack_mode == "eval":
            return super().perturb(model, batch, progress)
        with torch.autocast(batch.inputs.device.type, torch.bfloat16, enabled=progress.precision == "bf16"):
            return self.climb(model, batch, progress)

    def losses(self, model: nn.Module, batch: Batch, perturbed: Tensor, progress: Progress) -> Losses:
        return Losses(cross_entropy(model(perturbed), batch.labels))
