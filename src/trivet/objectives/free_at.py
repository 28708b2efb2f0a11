"""Free adversarial training (Shafahi et al., NeurIPS 2019): one backward pass moves weights and perturbation both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from trivet.data.dataset import Batch
from trivet.errors import require
from trivet.methods import method
from trivet.objectives.objective import Losses, Objective, Progress
from trivet.threats.losses import cross_entropy
from trivet.threats.threat import ThreatModel


@method(title="Free adversarial training", paper="Shafahi et al., NeurIPS 2019", year=2019, legs="robust")
@dataclass(frozen=True)
class FreeAt(Objective):
    """Each batch is replayed m times; one backward pass of CE(z(x + d), y) serves both players:

        theta <- theta - lr g_theta,      d <- P_S(x + d + eps sign(g_d)) - x.

    The perturbation d starts at 0 and is carried on, row by row, to the next batch, whose records are others, as
    published; a smaller batch uses its first rows. It costs what plain training of as many steps costs: divide the
    epochs by m. The ascent hangs on the caller's `backward()` through the weights, and the step's scale does not
    matter to it; a caller that only wants some gradients (`torch.autograd.grad`) leaves d as it was.

    Published for CIFAR-10, l_inf 8/255, m = 8: 85.96 % clean, 46.33 % under PGD-20 with 10 restarts (the authors),
    86.11 % and 41.47 % under AutoAttack (its authors).

    Attributes:
        threat: the perturbation set; the step is its whole radius.
        replays: m; 8 for CIFAR-10, 4 for ImageNet in the paper.
    """

    record_isolated: ClassVar[bool] = False  # a row of d was made by the records that stood there before

    threat: ThreatModel
    replays: int = 8
    _carried: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require(self.replays >= 1, f"replays={self.replays} must be at least 1.")

    def perturb(self, model: nn.Module, batch: Batch, progress: Progress) -> Tensor:
        x = batch.inputs
        return self.threat.project(x + self._rows(x)[: len(x)], x)

    def losses(self, model: nn.Module, batch: Batch, perturbed: Tensor, progress: Progress) -> Losses:
        x, point = batch.inputs, perturbed.detach().requires_grad_()

        def ascend(gradient: Tensor) -> None:
            moved = self.threat.project(self.threat.ascend(perturbed, gradient, self.threat.eps), x)
            self._carried["delta"] = torch.cat([moved - x, self._rows(x)[len(x) :]])

        point.register_hook(ascend)
        return Losses(cross_entropy(model(point), batch.labels))

    def _rows(self, x: Tensor) -> Tensor:
        """The carried perturbation, with rows of zeros added where the batch is larger than any before."""
        known = self._carried.get("delta", x.new_zeros(0, *x.shape[1:])).to(x.device)
        return torch.cat([known, x.new_zeros(max(len(x) - len(known), 0), *x.shape[1:])])

    def state(self) -> dict[str, Tensor]:
        return dict(self._carried)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._carried.clear()
        self._carried.update(state)
