"""Auto-PGD: projected gradient ascent with momentum whose step size adapts itself (Croce & Hein, ICML 2020)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from trivet.errors import require
from trivet.methods import method
from trivet.threats.attack import Attack, Target, fooled, input_gradient
from trivet.threats.losses import LOSSES, targeted_dlr
from trivet.threats.targeting import Tries, try_again, try_classes
from trivet.threats.threat import ThreatModel

AimedLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Logits [B, K], labels [B] and aimed-at classes [B] to losses [B]."""


@dataclass(frozen=True)
class AutoPGD(Attack):
    """What the untargeted and the targeted attack share.

    Attributes:
        steps: gradient steps of each restart.
        samples: forward passes averaged per gradient, for randomised models (EOT). With more than one, a point
            counts as beaten when the averaged logits are wrong.
        rho: the step size is halved where no more than this share of the last steps raised the loss.
        momentum: weight of the new direction; 1 - momentum is that of the last movement.
    """

    steps: int = 100
    samples: int = 1
    rho: float = 0.75
    momentum: float = 0.75

    def __post_init__(self) -> None:
        require(self.steps >= 1, f"steps={self.steps} must be at least 1.")
        require(self.samples >= 1, f"samples={self.samples} must be at least 1.")
        require(0 <= self.rho <= 1, f"rho={self.rho} must lie in [0, 1].")
        require(0 < self.momentum <= 1, f"momentum={self.momentum} must lie in (0, 1].")

    def _climb(
        self,
        model: Target,
        loss: AimedLoss,
        generator: torch.Generator | None,
        x: Tensor,
        y: Tensor,
        aim: Tensor,
        owner: Tensor,
    ) -> Tries:
        """One restart. Under l_1 the ascent passes through balls of 3 and 2 eps first (Croce & Hein, ICML 2021)."""
        if self.threat.norm != "L1":
            start = self.threat.random_start(x, generator)
            return self._ascend(model, loss, _Momentum(self.threat, x, y, aim, owner, start), self.steps)
        third = math.ceil(0.3 * self.steps)
        point = self.threat.scaled(3.0).random_start(x, generator)
        for factor, steps in ((3.0, third), (2.0, third), (1.0, max(self.steps - 2 * third, 1))):
            ball = self.threat.scaled(factor)
            rows = _Sparse(ball, x, y, aim, owner, ball.project(point, x))
            tries = self._ascend(model, loss, rows, steps, to_win=factor == 1.0)
            point = tries.points
        return tries

    def _ascend(self, model: Target, loss: AimedLoss, rows: _Rows, steps: int, to_win: bool = True) -> Tries:
        """`steps` steps of `rows`: verified successes where there were any, else the points of highest loss.

        If `to_win`, a point's rows are dropped as soon as one of them succeeds.
        """
        points, won = rows.point.clone(), torch.zeros_like(rows.y, dtype=torch.bool)
        score = torch.full_like(rows.y, -torch.inf, dtype=rows.x.dtype)
        rows.plan(steps, self.rho)
        for step in range(steps + 1):
            raised = partial(_aimed, loss, rows.y, rows.aim)
            rows.gradient, rows.loss, logits = input_gradient(model, rows.point, raised, self.samples)
            beaten = self._beaten(model, rows, logits) if to_win else None
            rows.remember(step)
            if beaten is not None:
                points[rows.row[beaten]], won[rows.row[beaten]] = rows.point[beaten], True
                rows.keep(~torch.isin(rows.owner, rows.owner[beaten]))
                if not len(rows.row):
                    break
            if step < steps:
                rows.move(self.momentum if step else 1.0)
        points[rows.row], score[rows.row] = rows.best, rows.best_loss
        return Tries(points, won, score)

    def _beaten(self, model: Target, rows: _Rows, logits: Tensor) -> Tensor | None:
        """Indices of the rows whose present point is a success, None if there are none."""
        candidates = fooled(logits, rows.y).nonzero().squeeze(1)
        if not len(candidates):
            return None
        point, x = rows.point[candidates], rows.x[candidates]
        if self.samples == 1:
            verified = self.succeeds(model, point, x, rows.y[candidates])
        else:
            verified = self.threat.contains(point, x)
        return candidates[verified] if bool(verified.any()) else None


@method(title="APGD", paper="Croce & Hein, ICML 2020", year=2020, legs="robust")
@dataclass(frozen=True)
class APGD(AutoPGD):
    """x_{t+1} = P( x_t + m (y_{t+1} - x_t) + (1 - m) (x_t - x_{t-1}) ), with y_{t+1} = P( x_t + s_t dir(grad) ).

    The step s_t starts at 2 eps. At checkpoints ever closer together it is halved, and the ascent goes back to the
    best point so far, for each example whose loss has not been rising. Under l_1 the steps are sparse instead, and
    the ball shrinks to its size in three stages (Croce & Hein, ICML 2021).

    Attributes:
        loss: "ce" or "dlr".
        restarts: independent starts; later ones attack only what still stands.
    """

    loss: Literal["ce", "dlr"] = "ce"
    restarts: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.restarts >= 1, f"restarts={self.restarts} must be at least 1.")

    def search(self, model: Target, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        def loss(logits: Tensor, labels: Tensor, _aim: Tensor) -> Tensor:
            return LOSSES[self.loss](logits, labels)

        return try_again(x, y, [partial(self._climb, model, loss, generator)] * self.restarts)


@method(title="APGD-T", paper="Croce & Hein, ICML 2020", year=2020, legs="robust", name="apgd_t")
@dataclass(frozen=True)
class APGDT(AutoPGD):
    """APGD on the targeted DLR loss, towards each of the `targets` most likely wrong classes.

    With fewer classes there are fewer targets; with two the loss is the plain margin.
    """

    targets: int = 9

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.targets >= 1, f"targets={self.targets} must be at least 1.")

    def search(self, model: Target, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        climb = partial(self._climb, model, targeted_dlr, generator)
        return try_classes(model, x, y, self.targets, climb)


def _aimed(loss: AimedLoss, y: Tensor, aim: Tensor, logits: Tensor) -> Tensor:
    return loss(logits, y, aim)


class _Rows(ABC):
    """The state of an ascent, one row for each try; every tensor attribute has the rows as first dimension.

    Attributes:
        row: where the result goes. owner: the point a try belongs to.
        x, y, aim: clean inputs, labels, classes aimed at.
        point, gradient, loss: the present iterate. best, best_gradient, best_loss: the one of highest loss.
        step: [B, 1, ...] step size, in input units.
    """

    gradient: Tensor
    loss: Tensor
    best_gradient: Tensor
    best_loss: Tensor
    step: Tensor

    def __init__(self, ball: ThreatModel, x: Tensor, y: Tensor, aim: Tensor, owner: Tensor, start: Tensor) -> None:
        self.ball = ball
        self.row = torch.arange(len(x), device=x.device)
        self.x, self.y, self.aim, self.owner = x, y, aim, owner
        self.point = self.best = start

    @abstractmethod
    def plan(self, steps: int, rho: float) -> None:
        """Set up step sizes and checkpoints for `steps` steps."""

    @abstractmethod
    def move(self, momentum: float) -> None:
        """Go to the next point along the present gradient."""

    @abstractmethod
    def adapt(self, step: int) -> None:
        """After `step` steps: at a checkpoint, change step sizes and go back where it does not pay to go on."""

    def remember(self, step: int) -> None:
        """Take note of the loss and the gradient at the point reached after `step` steps."""
        if step == 0:
            self.best, self.best_gradient, self.best_loss = self.point, self.gradient, self.loss
        else:
            better = self.loss > self.best_loss
            self.best = torch.where(self._wide(better), self.point, self.best)
            self.best_gradient = torch.where(self._wide(better), self.gradient, self.best_gradient)
            self.best_loss = torch.where(better, self.loss, self.best_loss)
        self.adapt(step)

    def go_back(self, where: Tensor) -> None:
        """Return to the best point in the rows `where` [B] bool."""
        self.point = torch.where(self._wide(where), self.best, self.point)
        self.gradient = torch.where(self._wide(where), self.best_gradient, self.gradient)

    def keep(self, kept: Tensor) -> None:
        """Drop all rows but `kept` [B] bool."""
        index = kept.nonzero().squeeze(1)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[index])

    def _wide(self, values: Tensor) -> Tensor:
        return values.view(-1, *[1] * (self.x.ndim - 1))


class _Momentum(_Rows):
    """The rule of l_inf and l_2, and of any threat model with `ascend` and `project`."""

    def plan(self, steps: int, rho: float) -> None:
        self.step = self._wide(torch.full((len(self.x),), 2 * self.ball.eps, device=self.x.device, dtype=self.x.dtype))
        self.gap, self.shrink, self.least = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
        self.rho, self.since = rho, 0
        self.previous = self.point
        self.halved = torch.ones(len(self.x), dtype=torch.bool, device=self.x.device)
        self.rises = torch.zeros(len(self.x), device=self.x.device)

    def move(self, momentum: float) -> None:
        ahead = self.ball.project(self.ball.ascend(self.point, self.gradient, self.step), self.x)
        if momentum < 1:
            ahead = self.point + momentum * (ahead - self.point) + (1 - momentum) * (self.point - self.previous)
            ahead = self.ball.project(ahead, self.x)
        self.previous, self.point = self.point, ahead

    def adapt(self, step: int) -> None:
        if step == 0:
            self.last_loss = self.checked_loss = self.loss
            return
        self.rises = self.rises + (self.loss > self.last_loss)
        self.last_loss = self.loss
        self.since += 1
        if self.since < self.gap:
            return
        # Halve where the loss mostly fell, or where the best has not moved with the step size of the last checkpoint.
        stalled = ~self.halved & (self.checked_loss >= self.best_loss)
        self.halved = (self.rises <= self.rho * self.gap) | stalled
        self.step = torch.where(self._wide(self.halved), self.step / 2, self.step)
        self.go_back(self.halved)
        self.checked_loss, self.rises = self.best_loss, torch.zeros_like(self.rises)
        self.since, self.gap = 0, max(self.gap - self.shrink, self.least)


class _Sparse(_Rows):
    """The rule of l_1: a step moves the share of pixels that the best perturbation so far suggests."""

    def plan(self, steps: int, rho: float) -> None:
        self.step = self._wide(torch.full((len(self.x),), self.ball.eps, device=self.x.device, dtype=self.x.dtype))
        self.gap = max(int(0.04 * steps), 1)
        self.pixels = self.x[0].numel()
        self.changed = self._changed(self.point)
        self.share = self.changed / self.pixels / 1.5

    def move(self, momentum: float) -> None:
        size = self.gradient.flatten(1).abs()
        rank = ((1 - self.share) * self.pixels).clamp(0, self.pixels - 1).long()
        least = size.sort(1).values.gather(1, rank[:, None])
        direction = self.gradient.flatten(1).sign() * (size >= least)
        direction = direction / direction.abs().sum(1, keepdim=True).clamp(min=1)
        self.point = self.ball.project(self.point + self.step * direction.view_as(self.x), self.x)

    def adapt(self, step: int) -> None:
        if step == 0 or step % self.gap:
            return
        changed = self._changed(self.best)
        sparser = changed < 0.95 * self.changed
        self.share, self.changed = changed / self.pixels / 1.5, changed
        step_size = torch.where(self._wide(sparser), self.ball.eps, self.step / 1.5)
        self.step = step_size.clamp(self.ball.eps / 10, self.ball.eps)
        self.go_back(sparser)

    def _changed(self, point: Tensor) -> Tensor:
        return (point != self.x).flatten(1).sum(1).to(self.x.dtype)
