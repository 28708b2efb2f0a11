"""Adversarial weight perturbation (Wu, Xia & Wang, NeurIPS 2020): robust at the worst weights nearby, too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from trivet.data.dataset import Batch, Dataset
from trivet.errors import require
from trivet.methods import method
from trivet.objectives.objective import Losses, Objective, Progress
from trivet.threats.threat import ThreatModel


@method(title="Adversarial weight perturbation", paper="Wu, Xia & Wang, NeurIPS 2020", year=2020, legs="robust")
@dataclass(frozen=True)
class Awp(Objective):
    """min_theta E max_{||v_l|| <= gamma ||theta_l||} L(theta + v; x'), for any objective L, in one step per batch:

        g = gradient of the mean L(theta; x'),      v_l = gamma ||theta_l|| / (||g_l|| + 1e-20) g_l,

    for every trained tensor l whose name holds "weight" and which has more than one dimension; x' is found by L at
    theta, before. The gradient of the mean L(theta + v; x') is what the caller receives at theta.

    The weights are never written: theta + v lives in a functional call, so there is nothing to restore. g is taken in
    train mode on copies of the buffers; BatchNorm's running statistics move once, at theta + v, as in the authors'
    code. One difference from it: there the optimiser steps on theta + v before v is taken off, so that weight decay
    acts on theta + v; here it acts on theta. One forward-backward pass more than L alone.

    Published for CIFAR-10, WRN-34-10, l_inf 8/255, AutoAttack: PGD training with it 85.36 % clean and 53.97 % robust,
    TRADES with it 85.36 % and 56.17 %, MART with it 84.43 % and 54.23 % (the authors, RobustBench).

    Attributes:
        objective: L, any other objective, e.g. `{name: trades, beta: 6}`.
        gamma: relative size of v; 0.01 for PGD training, 0.005 for TRADES. 0 is L itself.
        warmup_epochs: epochs of L alone before; 10 for TRADES in the paper's code.
    """

    record_isolated: ClassVar[bool] = False  # v depends on the whole batch

    objective: Objective
    gamma: float = 0.01
    warmup_epochs: float = 0.0

    def __post_init__(self) -> None:
        require(self.gamma >= 0, f"gamma={self.gamma} must not be negative.")
        require(self.warmup_epochs >= 0, f"warmup_epochs={self.warmup_epochs} must not be negative.")

    @property
    def replays(self) -> int:
        return self.objective.replays

    @property
    def threat(self) -> ThreatModel | None:
        """The inner objective's perturbation set, under which training may judge itself; None if it has none."""
        return getattr(self.objective, "threat", None)

    def perturb(self, model: nn.Module, batch: Batch, progress: Progress) -> Tensor:
        return self.objective.perturb(model, batch, progress)

    def losses(self, model: nn.Module, batch: Batch, perturbed: Tensor, progress: Progress) -> Losses:
        if self.gamma == 0 or progress.epoch < self.warmup_epochs:
            return self.objective.losses(model, batch, perturbed, progress)
        shift = self.shift(model, batch, perturbed, progress)
        moved = {f"model.{name}": theta + shift[name] for name, theta in model.named_parameters() if name in shift}
        return functional_call(_Priced(model, self.objective), moved, (batch, perturbed, progress))

    def shift(self, model: nn.Module, batch: Batch, perturbed: Tensor, progress: Progress) -> dict[str, Tensor]:
        """v by the name of its parameter; detached."""
        weights = {
            name: theta.detach().requires_grad_()
            for name, theta in model.named_parameters()
            if "weight" in name and theta.ndim > 1 and theta.requires_grad
        }
        require(
            bool(weights), "awp finds no trained weight of two or more dimensions in this model: nothing to perturb."
        )
        stand_in = weights | {name: buffer.clone() for name, buffer in model.named_buffers()}
        with torch.enable_grad():
            losses: Losses = functional_call(
                _Priced(model, self.objective),
                {f"model.{name}": tensor for name, tensor in stand_in.items()},
                (batch, perturbed, progress),
            )
            gradients = torch.autograd.grad(
                losses.per_example.mean(), list(weights.values()), allow_unused=True, materialize_grads=True
            )
        return {
            name: self.gamma * theta.detach().norm() / (gradient.norm() + 1e-20) * gradient
            for (name, theta), gradient in zip(weights.items(), gradients, strict=True)
        }

    @property
    def needs_holdout(self) -> bool:
        return self.objective.needs_holdout

    def judge(self, model: nn.Module, held: Dataset, progress: Progress) -> Mapping[str, float]:
        return self.objective.judge(model, held, progress)

    def state(self) -> dict[str, Tensor]:
        return self.objective.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.objective.load_state(state)


class _Priced(nn.Module):
    """An objective's losses as a module, so that `functional_call` can price weights other than the model's own."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch, perturbed: Tensor, progress: Progress) -> Losses:
        return self.objective.losses(self.model, batch, perturbed, progress)
