"""EAD: the elastic-net attack, C&W with a cost on the l_1 norm (Chen et al., AAAI 2018)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trivet.errors import require
from trivet.methods import method
from trivet.threats.attack import Target, input_gradient
from trivet.threats.losses import margin
from trivet.threats.weighed import Weighed


@method(title="EAD", paper="Chen, Sharma, Zhang, Yi & Hsieh, AAAI 2018", year=2018, legs="robust")
@dataclass(frozen=True)
class EAD(Weighed):
    """min over x' in [0, 1]^D of c max(z_y - max_{j != y} z_j, -kappa) + ||x' - x||_2^2 + beta ||x' - x||_1.

    Solved by FISTA, `steps` times for each of `searches` values of c, which are chosen as in C&W (9 in both papers):

        x_{k+1} = S( v_k - lr_k grad g(v_k) ),   v_{k+1} = x_{k+1} + k / (k + 3) (x_{k+1} - x_k),   k = 0, 1, …

    g is the objective without its l_1 part, lr_k = lr sqrt(1 - k / steps), and S moves each change of a pixel towards 0
    by beta, to 0 if it was smaller, and into the box. As published the threshold is beta at every step, where that of
    ISTA would be lr_k beta: the true weight of the l_1 norm is beta / lr_k. Of all misclassified x_k the one of least
    l_1 norm counts (the paper's l_1 decision rule), and breaks the threat if it lies within its radius. The threat must
    be an l_1 ball. The authors' code ends a value of c early when the batch makes no progress; here none ends early.

    Attributes:
        steps: for each c; 1000 in the paper.
        c: the first one; 0.001 in the paper.
        beta: the threshold; the paper compares 0.01 and 0.001, and Tramer & Boneh (NeurIPS 2019) take 0.01.
    """

    norm: ClassVar[str] = "L1"

    steps: int = 1000
    c: float = 0.001
    beta: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta >= 0, f"beta={self.beta} must not be negative.")

    def descend(self, model: Target, x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        best, reach = x.clone(), torch.full_like(weight, torch.inf)
        point = ahead = x

        def hinge(logits: Tensor) -> Tensor:
            return weight * (-margin(logits, y)).clamp_min(-self.kappa)

        for step in range(self.steps):
            rate = self.lr * (1 - step / self.steps) ** 0.5
            slope, _, _ = input_gradient(model, ahead, hinge, self.samples)
            before, point = point, shrunk(ahead - rate * (slope + 2 * (ahead - x)), x, self.beta)
            ahead = point + step / (step + 3) * (point - before)
            distance = (point - x).flatten(1).abs().sum(1)
            closer = distance < reach
            if bool(closer.any()):
                with torch.no_grad():
                    closer &= margin(model(point), y) > self.kappa
                    if bool(closer.any()):
                        closer &= model.misclassifies(point, y)
                best[closer], reach[closer] = point[closer], distance[closer]
        return best, reach


def shrunk(point: Tensor, x: Tensor, beta: float) -> Tensor:
    """argmin over x' in [0, 1]^D of ||x' - point||_2^2 / 2 + beta ||x' - x||_1, for `x` in [0, 1]^D."""
    change = point - x
    kept = (x + change.sign() * (change.abs() - beta)).clamp(0.0, 1.0)
    return torch.where(change.abs() > beta, kept, x)
