"""An attack that makes wrong choices likelier without flipping any: the budget in equal parts over many steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trivet.control.episodes import View
from trivet.control.observation_attack import ObservationAttack
from trivet.errors import require
from trivet.methods import method


@method(title="Steady pushes", legs="robust")
@dataclass(frozen=True)
class SteadyPush(ObservationAttack):
    """Each of the first `steps` observations is moved by B / sqrt(steps) against the agent's preference.

    The direction is that in which the value of the best action falls fastest relative to the worst one's, averaged
    over `draws` of the noise to come. A smoothed agent acts on one draw, so its chance of a wrong action rises with
    any such move, whether or not its mean choice flips. Greedy flips spend nothing on agents whose choices they cannot
    flip; this attack always spends all of its budget, as the one that a certificate is tight against does.

    Attributes:
        steps: over which the budget is spread.
        draws: of the noise, averaged.
    """

    steps: int = 20
    draws: int = 16

    def __post_init__(self) -> None:
        require(self.steps >= 1, f"steps={self.steps} must be at least 1.")
        require(self.draws >= 1, f"draws={self.draws} must be at least 1.")

    def __call__(self, view: View) -> Tensor:
        """The shifts [n, D]; zero after `steps`, and where the preference does not depend on the frame."""
        if view.step >= self.steps:
            return torch.zeros_like(view.observation)
        shape = (self.draws if view.sigma else 1, *view.observation.shape)
        noise = view.sigma * torch.randn(shape, generator=view.generator, dtype=torch.float64)
        with torch.enable_grad():
            moving = view.observation.clone().requires_grad_()
            values = view.values(moving + noise).mean(0)
            preference = values.amax(1) - values.amin(1)
            (gradient,) = torch.autograd.grad(preference.sum(), moving)
        length = (view.left / (self.steps - view.step)).sqrt()[:, None]
        return -length * gradient / gradient.norm(dim=1, keepdim=True).clamp(min=1e-300)
