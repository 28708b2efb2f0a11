"""The attack of policy smoothing's experiments: spend the budget on making the agent choose what it values little."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trivet.control.episodes import View
from trivet.control.observation_attack import ObservationAttack
from trivet.errors import require
from trivet.methods import method


@method(title="Greedy action flips", paper="Kumar, Levine & Feizi, ICLR 2022", year=2022, legs="robust")
@dataclass(frozen=True)
class GreedyFlip(ObservationAttack):
    """At each step, the cheapest shift found that turns the agent's choice to a bad action; what is left is carried on.

    The agent's value of an action is its mean over `draws` of the noise to come, on top of the noisy frames it has
    already seen. Targets are the actions valued more than `threshold` below the best. For each, gradient ascent on the
    log-probability of the target under softmax, in steps of length `step` along the gradient, inside the ball of the
    budget left, until the choice flips or twice the budget has been walked; of the shifts that flip it, the one to the
    action with the lowest value is applied and paid for. Where none flips it, nothing is spent.

    The published attack reads the true history instead of the noisy one; this one knows more. It is greedy, so only an
    upper bound on what an agent keeps: try several thresholds and report the worst.

    Attributes:
        threshold: in units of the policy's values; the paper's scans 0, 1, 2 (and to 10 for agents without noise).
        draws: of the noise, averaged; 128 in the paper. An agent without noise needs one.
        step: length of a step of ascent.
    """

    threshold: float = 0.0
    draws: int = 128
    step: float = 0.01

    def __post_init__(self) -> None:
        require(self.threshold >= 0, f"threshold={self.threshold} must not be negative.")
        require(self.draws >= 1, f"draws={self.draws} must be at least 1.")
        require(0 < self.step < math.inf, f"step={self.step} must be positive and finite.")

    def __call__(self, view: View) -> Tensor:
        """The shifts [n, D]; zero where there is no budget, no target, or no flip."""
        shape = (self.draws if view.sigma else 1, *view.observation.shape)
        noise = view.sigma * torch.randn(shape, generator=view.generator, dtype=torch.float64)
        values = view.values(view.observation + noise).mean(0)
        shift = torch.zeros_like(view.observation)
        lowest = torch.full_like(view.left, torch.inf)
        for target in range(values.shape[1]):
            wanted = (values[:, target] < values.amax(1) - self.threshold) & (view.left > 0)
            rows = wanted.nonzero().squeeze(1)
            if not len(rows):
                continue
            found, flipped = self._search(_rows(view, rows), noise[:, rows], target)
            better = flipped & (values[rows, target] < lowest[rows])
            shift[rows[better]] = found[better]
            lowest[rows[better]] = values[rows[better], target].double()
        return shift

    def _search(self, view: View, noise: Tensor, target: int) -> tuple[Tensor, Tensor]:
        """Shifts [n, D] toward choosing `target`, and which [n] of them achieve it."""
        shift = torch.zeros_like(view.observation)
        flipped = torch.zeros(len(shift), dtype=torch.bool)
        radius = view.left.sqrt()
        rounds = math.ceil(2 * float(radius.max()) / self.step)
        going = torch.arange(len(shift))
        for _ in range(rounds + 1):
            part = _rows(view, going)
            with torch.enable_grad():
                moving = shift[going].requires_grad_()
                values = part.values(part.observation + moving + noise[:, going]).mean(0)
                loss = F.cross_entropy(values, torch.full((len(going),), target), reduction="sum")
                (gradient,) = torch.autograd.grad(loss, moving)
            done = values.argmax(1) == target
            flipped[going[done]] = True
            going, gradient = going[~done], gradient[~done]
            if not len(going):
                break
            length = gradient.norm(dim=1, keepdim=True)
            moved = shift[going] - self.step * gradient / length.clamp(min=1e-300)
            reach = moved.norm(dim=1, keepdim=True).clamp(min=1e-300)
            shift[going] = moved * (radius[going, None] / reach).clamp(max=1.0)
        return shift, flipped


def _rows(view: View, rows: Tensor) -> View:
    """The view of some of the episodes."""
    observation, history, left = view.observation[rows], view.history[rows], view.left[rows]
    return View(view.policy, observation, history, left, view.step, view.sigma, view.generator)
