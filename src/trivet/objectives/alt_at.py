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

    A step costs as much as one of `PgdAt`. The order of the types is that of `threat`.
    """

    def turn(self, progress: Progress) -> int:
        """Which member, counted from 0, this step trains on."""
        return progress.step % len(self.threat.members)

    def perturb(self, model: nn.Module, batch: Batch, progress: Progress) -> Tensor:
        return self.attacked_by(self.turn(progress), model, batch, progress)

    def losses(self, model: nn.Module, batch: Batch, perturbed: Tensor, progress: Progress) -> Losses:
        loss, turn = cross_entropy(model(perturbed), batch.labels), self.turn(progress)
        return Losses(loss, {f"{turn + 1}_{self.threat.members[turn].norm}": loss.detach()})
