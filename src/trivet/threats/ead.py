"""EAD: the elastic-net attack, C&W with a cost on the l_1 norm (Chen et al., AAAI 2018)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from trivet.errors import require
from trivet.methods import method
from trivet.threats.attack import Attack, Target, input_gradient
from trivet.threats.carlini_wagner import weighed
from trivet.threats.losses import margin


@method(title="EAD", paper="Chen, Sharma, Zhang, Yi & Hsieh, AAAI 2018", year=2018, legs="robust")
@dataclass(frozen=True)
class EAD(Attack):
    """min over x' in [0, 1]^D of c max(z_y - max_{j != y} z_j, -kappa) + ||x' - x||_2^2 + beta ||x' - x||_1.

    Solved by FISTA, `steps` times for each of `searches` values of c, which are chosen as in C&W:

        x_{k+1} = S( v_k - lr_k grad g(v_k) ),   v_{k+1} = x_{k+1} + k / (k + 3) (x_{k+1} - x_k),   k = 0, 1, …

    g is the objective without its l_1 part, lr_k = lr sqrt(1 - k / steps), and S moves each change of a pixel towards 0
    by beta, to 0 if it was smaller, and into the box. As published the threshold is beta at every step, where that of
    ISTA would be lr_k beta: the true weight of the l_1 norm is beta / lr_k. Of all misclassified x_k the one of least
    l_1 norm counts (the paper's l_1 decision rule), and breaks the threat if it lies within its radius. The threat must
    be an l_1 ball. The authors' code ends a value of c early when the batch makes no progress; here none ends early.

    Attributes:
        steps: for each c; 1000 in the paper.
        searches: values of c; 9 in the paper.
        lr: the first step length; 0.01 in the paper.
        c: the first one; 0.001 in the paper.
        beta: the threshold; the paper compares 0.01 and 0.001, and Tramer & Boneh (NeurIPS 2019) take 0.01.
        kappa: the margin by which another class must win.
        samples: forward passes averaged per gradient, for randomised models.
    """

    steps: int = 1000
    searches: int = 9
    lr: float = 0.01
    c: float = 0.001
    beta: float = 0.01
    kappa: float = 0.0
    samples: int = 1

    def __post_init__(self) -> None:
        require(self.threat.norm == "L1", f"threat={self.threat.norm}: EAD minimises the l_1 norm; choose l1.")
        for name in ("steps", "searches", "samples"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("lr", "c"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive.")
        for name in ("beta", "kappa"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative.")

    def search(self, model: Target, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.threat.project(self.nearest(model, x, y)[0], x)

    def nearest(self, model: Target, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest adversarial points [B, ...] found, and their l_1 distance [B]; x and infinity where none was."""
        return weighed(partial(self._descend, model, x, y), x, self.c, self.searches)

    def _descend(self, model: Target, x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
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
