"""Adversarial training against several types of perturbation at once (Tramer & Boneh, NeurIPS 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from trivet.data.dataset import Batch
from trivet.errors import require
from trivet.models.modes import evaluating
from trivet.models.surrogate import surrogate
from trivet.objectives.objective import Progress
from trivet.threats.attack import Attack, Target
from trivet.threats.l1 import L1
from trivet.threats.pgd import PGD
from trivet.threats.rotation_translation import RotationTranslation, worst_transform
from trivet.threats.slide import Slide
from trivet.threats.threat import ThreatModel


@dataclass(frozen=True)
class MultiPerturbation:
    """One attack on each member of `threat` inside a training step: what AVG, MAX and ALT share.

    PGD on l_inf and l_2 balls, SLIDE on l_1 balls, the worst of `draws` random transforms for rotations. All see the
    model in eval mode and start from the same random stream, so that two equal members find the same points.

    Published: MNIST, l_inf 0.3 (10 steps of 0.01), l_1 10 (10 of 1), l_2 2 (10 of 0.1), the first epoch at a third of
    the radii; CIFAR-10, l_inf 4/255 and l_1 2000/255, or l_inf and rotations.

    Attributes:
        threat: a `union`; any other threat is a union of one.
        steps: gradient steps of each attack.
        step_sizes: one for each member in its own units, those of rotations unused; none given means 2.5 eps / steps.
        draws: random transforms tried for each rotation_translation member.
        loss: what the norm attacks raise; the paper's is the margin.
        eps_ramp: fraction of training over which all radii grow linearly from 0.
    """

    threat: ThreatModel
    steps: int = 10
    step_sizes: tuple[float, ...] = ()
    draws: int = 10
    loss: Literal["ce", "margin"] = "margin"
    eps_ramp: float = 0.0

    def __post_init__(self) -> None:
        require(self.steps >= 1, f"steps={self.steps} must be at least 1.")
        require(self.draws >= 1, f"draws={self.draws} must be at least 1.")
        require(0 <= self.eps_ramp < 1, f"eps_ramp={self.eps_ramp} must lie in [0, 1).")
        members = len(self.threat.members)
        fits = not self.step_sizes or (len(self.step_sizes) == members and min(self.step_sizes) >= 0)
        require(fits, f"step_sizes={list(self.step_sizes)} must be {members} numbers, none negative; one per member.")

    def attacked(self, model: nn.Module, batch: Batch, progress: Progress) -> Tensor:
        """[k, B, ...]: of each member the point that its attack found for each record, adversarial or not; detached."""
        types = range(len(self.threat.members))
        return torch.stack([self.attacked_by(number, model, batch, progress) for number in types])

    def attacked_by(self, number: int, model: nn.Module, batch: Batch, progress: Progress) -> Tensor:
        """[B, ...]: what the attack on member `number`, counted from 0, finds when it runs alone; detached."""
        scale = min(1.0, progress.fraction / self.eps_ramp) if self.eps_ramp else 1.0
        x, y, draw = batch.inputs, batch.labels, progress.generator("start", batch.inputs.device)
        threat = self.threat.members[number].scaled(scale)
        with evaluating(model):
            target = Target(surrogate(model, progress.precision), model, max(len(batch), 1))
            if isinstance(threat, RotationTranslation):
                moves = (threat.random_moves(x, draw) for _ in range(self.draws))
                return worst_transform(target, threat, x, y, moves).detach()
            length = scale * self.step_sizes[number] if self.step_sizes else None
            return self._attack(threat, length).search(target, x, y, draw).detach()

    def _attack(self, threat: ThreatModel, length: float | None) -> Attack:
        if isinstance(threat, L1):
            return Slide(threat, self.steps, gamma=length, loss=self.loss)
        return PGD(threat, self.steps, length, loss=self.loss)
