"""ALT adversarial training: the types of perturbation take turns, batch by batch (Tramer & Boneh, NeurIPS 2019)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from trivet.data.dataset import Batch
from trivet.methods import method
from trivet.objectives.multi_perturbation import MultiPerturbation
from trivet.objectives.objective import Losses, Objective, Progress
from trivet.threats.losses import cross_entropy


@method(
    title="ALT adversarial training",
    paper="Tramer & Boneh, NeurIPS 2019",
    year=2019,
    legs="robust",
    note="a baseline; its authors' code says that it does not work very well",
)
@dataclass(frozen=True)
class AltAt(MultiPerturbation, Objective):
    """min_theta CE(z(A_i(x)), y) with i = t mod k in step t: one attack a step, where AVG and MAX make all k.

    A step makes one attack, so that training costs one k-th of AVG. The order of the types is that of `threat`.

    What the evidence shows: digits, a perceptron (128, 64), l_inf 0.1 and l_1 2, 30 epochs, one run each, 355 test
    records, attacks with and without gradients, `results/multi-perturbation.json`. Accuracy left against the union:
    60.0 % for this, 61.4 % for AVG and for AVG at half the rate, 64.2 % for AVG in half the batch, 65.6 % for MAX. Each
    has an exact 95 % interval of 5 points either way, so that only the direction agrees with the authors' remark.
    """

    def turn(self, progress: Progress) -> int:
        """Which member, counted from 0, this step trains on."""
        return progress.step % len(self.threat.members)

    def perturb(self, model: nn.Module, batch: Batch, progress: Progress) -> Tensor:
        return self.attacked_by(self.turn(progress), model, batch, progress)

    def losses(self, model: nn.Module, batch: Batch, perturbed: Tensor, progress: Progress) -> Losses:
        loss, turn = cross_entropy(model(perturbed), batch.labels), self.turn(progress)
        return Losses(loss, {f"{turn + 1}_{self.threat.members[turn].norm}": loss.detach()})
