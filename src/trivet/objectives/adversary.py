"""The inner maximisation that adversarial objectives share: a few PGD steps around each record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trivet.data.dataset import Batch
from trivet.errors import require
from trivet.models.modes import evaluating
from trivet.models.surrogate import Logits, surrogate
from trivet.objectives.objective import Progress
from trivet.threats.losses import cross_entropy
from trivet.threats.pgd import ascend
from trivet.threats.threat import ThreatModel


@dataclass(frozen=True)
class Adversary:
    """PGD inside a training step. Methods differ in where it starts (`start`) and what it raises (`inner_loss`).

    Attributes:
        threat: the perturbation set; recipes give it once, for training and audit alike.
        steps: gradient steps.
        step_size: in input units; None means 2.5 eps / steps.
        eps_ramp: fraction of training over which the radius grows linearly from 0 to eps. At large radii training
            from scratch otherwise gets stuck at constant predictions.
    """

    threat: ThreatModel
    steps: int = 10
    step_size: float | None = None
    eps_ramp: float = 0.0

    def __post_init__(self) -> None:
        require(self.steps >= 1, f"steps={self.steps} must be at least 1.")
        require(0 <= self.eps_ramp < 1, f"eps_ramp={self.eps_ramp} must lie in [0, 1).")
        require(self.step_size is None or self.step_size >= 0, f"step_size={self.step_size} must not be negative.")

    @property
    def step_length(self) -> float:
        """What `step_size` stands for, in input units at the full radius."""
        return 2.5 * self.threat.eps / self.steps if self.step_size is None else self.step_size

    def start(self, threat: ThreatModel, batch: Batch, progress: Progress) -> Tensor:
        """Where the ascent begins; a random point of the set."""
        return threat.random_start(batch.inputs, progress.generator("start", batch.inputs.device))

    def inner_loss(self, model: Logits, batch: Batch) -> Callable[[Tensor], Tensor]:
        """What the adversary raises, as a function of the logits [B, K]; the cross-entropy."""
        return lambda logits: cross_entropy(logits, batch.labels)

    def climb(self, ask: Logits, batch: Batch, progress: Progress) -> Tensor:
        """The last iterate [B, ...] of the ascent on `ask`, in the radius of this moment of the ramp; detached."""
        scale = min(1.0, progress.fraction / self.eps_ramp) if self.eps_ramp else 1.0
        threat = self.threat.scaled(scale)
        return ascend(
            ask,
            batch.inputs,
            self.start(threat, batch, progress),
            self.inner_loss(ask, batch),
            threat=threat,
            steps=self.steps,
            step_size=scale * self.step_length,
        )

    def perturb(self, model: nn.Module, batch: Batch, progress: Progress) -> Tensor:
        """`climb` on the frozen model: eval mode, no weight gradients, the mode restored afterwards."""
        with evaluating(model):
            return self.climb(surrogate(model, progress.precision), batch, progress)


def start_beside(threat: ThreatModel, batch: Batch, progress: Progress) -> Tensor:
    """x + 0.001 N(0, I), in the set: how TRADES and MART start. At x itself KL(p(x) || p(x')) has gradient zero."""
    x = batch.inputs
    noise = torch.empty_like(x).normal_(generator=progress.generator("start", x.device))
    return threat.project(x + 0.001 * noise, x)
