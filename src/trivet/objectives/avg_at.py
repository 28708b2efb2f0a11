"""AVG adversarial training: all types of perturbation of each record (Tramer & Boneh, NeurIPS 2019)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from trivet.data.dataset import Batch
from trivet.methods import method
from trivet.objectives.multi_perturbation import MultiPerturbation
from trivet.objectives.objective import Losses, Objective, Progress
from trivet.objectives.views import view_logits


@method(title="AVG adversarial training", paper="Tramer & Boneh, NeurIPS 2019", year=2019, legs="robust")
@dataclass(frozen=True)
class AvgAt(MultiPerturbation, Objective):
    """min_theta E (1/k) sum_i CE(z(A_i(x)), y): k views of each record go through the network in one batch.

    The authors' two forms that save memory are settings of the training stage: HALF_LR divides the learning rate by k,
    HALF_BATCH the batch, which at the same epochs makes k times the steps (recipes digits-avg-at-half-lr, -half-batch).

    Published from memory, MNIST (l_inf 0.3, l_1 10, l_2 2): 97.3 % clean, 49.9 % against the union; an independent
    run reports 34.9 % on 1000 images. The cautions of `MaxAt` hold here too. No certificate.
    """

    def perturb(self, model: nn.Module, batch: Batch, progress: Progress) -> Tensor:
        return self.attacked(model, batch, progress).transpose(0, 1)

    def losses(self, model: nn.Module, batch: Batch, perturbed: Tensor, progress: Progress) -> Losses:
        chances = view_logits(model, perturbed).log_softmax(2)
        true = batch.labels.view(-1, 1, 1).expand(-1, perturbed.shape[1], 1)
        by_type = -chances.gather(2, true).squeeze(2)
        names = (f"{number}_{member.norm}" for number, member in enumerate(self.threat.members, 1))
        return Losses(by_type.mean(1), dict(zip(names, by_type.detach().unbind(1), strict=True)))
