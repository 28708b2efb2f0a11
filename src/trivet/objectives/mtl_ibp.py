"""MTL-IBP, CC-IBP and Exp-IBP (De Palma et al., ICLR 2024): a dial between the adversarial and the interval loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from trivet.errors import require
from trivet.methods import method
from trivet.objectives.certified import Robust, Step, robust_cross_entropy
from trivet.objectives.inner_attack import AttackedTraining
from trivet.objectives.objective import Progress
from trivet.threats.losses import cross_entropy


@method(title="MTL-IBP, CC-IBP, Exp-IBP", paper="De Palma et al., ICLR 2024", year=2024, legs="robust")
@dataclass(frozen=True)
class MtlIbp(AttackedTraining):
    """Between the loss of `ibp` over the box, CE_IBP, and the cross-entropy at the point x* that PGD finds, CE_adv:

        mtl    alpha CE_IBP + (1 - alpha) CE_adv
        cc     the cross-entropy of the margins alpha m_IBP + (1 - alpha) m(x*)
        exp    CE_IBP^alpha CE_adv^(1 - alpha)

    alpha = 1 is `ibp` without its clean term, alpha = 0 is PGD training. Only at 1 is it a bound of the worst loss:
    what the trained network is worth is said by verification afterwards, by more than intervals.

    Published for mtl, clean / certified: CIFAR-10 2/255 80.11 / 63.24 %, 8/255 53.35 / 35.44 %.

    Attributes:
        alpha: see above; 0.02 at MNIST 0.1, 0.5 at 0.3, 0.01 and 0.6 on CIFAR-10 2/255 and 8/255 (CTBench).
        form: of the dial.
        attack_scale: radius of the attack relative to eps_t; 2 on CIFAR-10 2/255.
    """

    kappa_end: float = 0.0
    steps: int = 1
    alpha: float = 0.5
    form: Literal["mtl", "cc", "exp"] = "mtl"
    attack_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.alpha <= 1, f"alpha={self.alpha} must lie in [0, 1].")
        require(self.form in ("mtl", "cc", "exp"), f"form={self.form!r} must be mtl, cc or exp.")
        require(self.attack_scale >= 0, f"attack_scale={self.attack_scale} must not be negative.")

    def attack_radius(self, progress: Progress) -> float:
        return self.attack_scale * super().attack_radius(progress)

    def robust(self, step: Step) -> Robust:
        lower, intervals = step.lower, step.intervals
        logits = step.model(step.perturbed)
        if self.form == "cc":
            margins = (step.rows @ logits.unsqueeze(2)).squeeze(2)
            return Robust(robust_cross_entropy(self.alpha * lower + (1 - self.alpha) * margins), intervals)
        bound, attacked = robust_cross_entropy(lower), cross_entropy(logits, step.batch.labels)
        if self.form == "mtl":
            return Robust(self.alpha * bound + (1 - self.alpha) * attacked, intervals)
        least = torch.finfo(bound.dtype).tiny  # the logarithm of a loss that has underflown
        power = self.alpha * bound.clamp(min=least).log() + (1 - self.alpha) * attacked.clamp(min=least).log()
        return Robust(power.exp(), intervals)
