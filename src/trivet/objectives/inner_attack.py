"""The adversarial point inside a step of certified training: PGD in a box, as in CTBench (Mao et al., ICML 2025)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trivet.certify.bounds.interval import Box
from trivet.data.dataset import Batch
from trivet.errors import require
from trivet.models.batch_statistics import held_at, training_norms
from trivet.models.modes import evaluating
from trivet.models.surrogate import Logits, surrogate
from trivet.objectives.certified import CertifiedTraining, clipped_box
from trivet.objectives.objective import Progress
from trivet.threats.attack import input_gradient
from trivet.threats.losses import cross_entropy


@dataclass(frozen=True)
class AttackedTraining(CertifiedTraining):
    """Certified training whose robust term looks at an adversarial point x*, too.

    Where BatchNorm is in training mode, the attack sees the network as the clean pass of the step does, which takes
    a pass of its own.

    Attributes:
        steps: of PGD on the cross-entropy, each max(1/4, 2 / steps) of the box's half-width by signs, from a uniformly
            random point of the ball.
        restarts: independent searches; of each record the point with the largest loss is kept.
    """

    steps: int = 10
    restarts: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.steps >= 1, f"steps={self.steps} must be at least 1.")
        require(self.restarts >= 1, f"restarts={self.restarts} must be at least 1.")

    def attack_radius(self, progress: Progress) -> float:
        """In which x* is looked for, at this moment of training."""
        return self.grown(progress) * self.eps_max

    def perturb(self, model: nn.Module, batch: Batch, progress: Progress) -> Tensor:
        inputs, radius = super().perturb(model, batch, progress), self.attack_radius(progress)
        if radius == 0:
            return inputs
        box, draw = clipped_box(batch.inputs, radius), progress.generator("start", batch.inputs.device)
        frozen = held_at(model, batch.inputs, update=False) if training_norms(model) else evaluating(model)
        with torch.no_grad(), frozen:
            return search(surrogate(model, progress.precision), batch, box, self.steps, self.restarts, draw)


def search(ask: Logits, batch: Batch, box: Box, steps: int, restarts: int, draw: torch.Generator) -> Tensor:
    """The points [B, ...] of `box` where PGD ends, those with the largest cross-entropy among the restarts."""
    half = (box.upper - box.lower) / 2
    length = max(0.25, 2 / steps) * half
    best, most = batch.inputs, torch.full_like(batch.labels, -torch.inf, dtype=batch.inputs.dtype)
    for _ in range(restarts):
        noise = torch.empty_like(batch.inputs).uniform_(-1, 1, generator=draw)
        point = torch.clamp(batch.inputs + noise * half, box.lower, box.upper)
        for _ in range(steps):
            gradient, _, _ = input_gradient(ask, point, lambda logits: cross_entropy(logits, batch.labels))
            point = torch.clamp(point + length * gradient.sign(), box.lower, box.upper)
        if restarts == 1:
            return point
        found = cross_entropy(ask(point), batch.labels)
        best = point.where((found > most).view(-1, *[1] * (point.ndim - 1)), best)
        most = torch.maximum(found, most)
    return best
