"""MAX adversarial training: each record's worst type of perturbation (Tramer & Boneh, NeurIPS 2019)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trivet.data.dataset import Batch
from trivet.methods import method
from trivet.models.modes import evaluating
from trivet.models.surrogate import surrogate
from trivet.objectives.multi_perturbation import MultiPerturbation
from trivet.objectives.objective import Losses, Objective, Progress
from trivet.threats.losses import cross_entropy


@method(title="MAX adversarial training", paper="Tramer & Boneh, NeurIPS 2019", year=2019, legs="robust")
@dataclass(frozen=True)
class MaxAt(MultiPerturbation, Objective):
    """min_theta E max_i CE(z(A_i(x)), y), the type i chosen for each record by its cross-entropy in eval mode.

    Published from memory, MNIST (l_inf 0.3, l_1 10, l_2 2): 97.2 % clean, 52.4 % against the union; an independent
    run reports 42.1 % on 1000 images. Gradient attacks alone rate such networks too high: they learn to threshold
    pixels, so judge them by attacks without gradients as well, type by type. No certificate.
    """

    def perturb(self, model: nn.Module, batch: Batch, progress: Progress) -> Tensor:
        candidates = self.attacked(model, batch, progress)
        if len(candidates) == 1:
            return candidates[0]
        with torch.no_grad(), evaluating(model):
            ask = surrogate(model, progress.precision)
            worst = torch.stack([cross_entropy(ask(each), batch.labels) for each in candidates]).argmax(0)
        return candidates[worst, torch.arange(len(batch), device=batch.inputs.device)]

    def losses(self, model: nn.Module, batch: Batch, perturbed: Tensor, progress: Progress) -> Losses:
        return Losses(cross_entropy(model(perturbed), batch.labels))
