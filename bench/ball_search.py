"""The search for other answers inside of certified balls: what `inside_balls.py` does in every kind of ball."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trivet.models.foreign.quantized import Quantize
from trivet.models.foreign.twinned import Twinned
from trivet.models.mahalanobis_knn import MahalanobisKnn
from trivet.statistics import binomial_lower, binomial_upper

CONTRADICTED = 1e-9
"""How likely the votes at one point may contradict a true certificate by chance."""
BATCHES = (4096, 1, 7, 33)
"""Inputs that a network is asked about at once; sums of other shapes are taken in other orders."""


@dataclass
class Claim:
    """Balls around `x` [N, ...] in which `certifier` says that the answer is `labels` [N]; radii [N] are positive."""

    certifier: str
    network: str
    norm: str
    model: nn.Module
    x: Tensor
    labels: Tensor
    radii: Tensor
    draw: torch.Generator
    alpha: float = 0.0
    smoothed: Callable[[Tensor, int], Tensor] | None = None
    tries: int = 0
    violations: int = 0
    least: float = float("inf")
    beyond: float | None = None
    worst: Tensor = field(init=False)
    low: Tensor = field(init=False)
    high: Tensor = field(init=False)
    seconds: float = 0.0
    sigma: float = 0.0

    def __post_init__(self) -> None:
        self.worst = self.x.clone()
        self.margins = torch.full((len(self.x),), torch.inf, dtype=torch.float64)
        self.low, self.high = (self._end(sign) for sign in (-1, 1))

    def _end(self, sign: int) -> Tensor:
        """The outermost numbers of the l_inf ball in [0, 1], in the type of x: rounded inwards."""
        x, inward = self.x.double(), torch.full_like(self.x, -sign * torch.inf)
        exact = x + sign * self.per_ball(self.radii)
        found = exact.to(self.x.dtype)
        found = torch.where(sign * (found.double() - x) > self.per_ball(self.radii), found.nextafter(inward), found)
        return found if self.network.startswith("neighbours") else found.clamp(0, 1)

    def per_ball(self, values: Tensor) -> Tensor:
        return values.view(-1, *[1] * (self.x.ndim - 1))

    def inside(self, points: Tensor) -> Tensor:
        """Points [R, N, ...] moved into the balls, as far out as they were or as far as the ball goes."""
        points = torch.minimum(torch.maximum(points.to(self.x.dtype), self.low), self.high)
        if self.norm == "Linf":
            return points
        order = 2 if self.norm == "L2" else 1
        shrink = 1.0
        for _ in range(6):
            moves = points.double() - self.x.double()
            length = torch.linalg.vector_norm(moves.flatten(2), ord=order, dim=2)
            outside = length >= self.radii * (1 - 1e-12)
            if not bool(outside.any()):
                return points
            factor = torch.where(outside, self.radii * (1 - 1e-9) * shrink / length, 1.0)
            moved = (self.x.double() + factor.view(*factor.shape, *[1] * (self.x.ndim - 1)) * moves).to(points.dtype)
            points = moved.clamp(self.low, self.high)
            shrink *= 1 - 1e-7
        return self.x.expand_as(points).clone()

    def margin(self, logits: Tensor) -> Tensor:
        """[R N] logits to [R, N] margins of the certified labels."""
        logits = logits.double().view(-1, len(self.x), logits.shape[1])
        own = self.labels.view(1, -1, 1).expand(len(logits), -1, 1)
        others = logits.scatter(2, own, -torch.inf).amax(2)
        return logits.gather(2, own).squeeze(2) - others

    def judge(self, points: Tensor, logits: Tensor) -> Tensor:
        """Count tries and violations, and remember the worst point of each ball; returns margins [R, N]."""
        margins = self.margin(logits.detach())
        self.tries += margins.numel()
        self.violations += int((~(margins > 0)).sum())  # NaN and ties, too
        least, at = margins.min(0)
        better = least < self.margins
        self.worst[better] = points.detach()[at, torch.arange(len(self.x))][better]
        self.margins = torch.minimum(self.margins, least)
        self.least = min(self.least, float(least.min()))
        return margins

    @torch.no_grad()
    def ask(self, points: Tensor, batch: int = BATCHES[0]) -> Tensor:
        return self.judge(points, torch.cat([self.model(part) for part in points.flatten(0, 1).split(batch)]))

    def random(self, count: int) -> Tensor:
        """Corners, surfaces and insides, [count, N, ...]."""
        moves = torch.randn(count, *self.x.shape, generator=self.draw, dtype=torch.float64)
        scale = self.per_ball(self.radii)
        if self.norm == "Linf":
            share = torch.rand(moves.shape, generator=self.draw, dtype=torch.float64)
            inner = torch.rand(count, len(self.x), *[1] * (self.x.ndim - 1), generator=self.draw)
            moves = torch.where(inner < 0.7, moves.sign(), 2 * share - 1)
        else:
            sparse = torch.rand(count, len(self.x), *[1] * (self.x.ndim - 1), generator=self.draw) < 0.5
            few = torch.rand(moves.shape, generator=self.draw) < 0.05
            moves = moves.where(~sparse | few, 0.0)
            length = torch.linalg.vector_norm(moves.flatten(2), ord=2 if self.norm == "L2" else 1, dim=2)
            moves = moves / length.clamp(min=1e-9).view(count, len(self.x), *[1] * (self.x.ndim - 1))
        return self.inside(self.x.double() + scale * moves)

    def descend(self, starts: int, steps: int) -> Tensor:
        """Down the margin, from random points; each step is a try. Returns where it ended."""
        points, scale = self.random(starts), self.per_ball(self.radii)
        for step in range(steps):
            points = points.requires_grad_()
            logits = self.model(points.flatten(0, 1))
            self.judge(points, logits)
            (gradient,) = torch.autograd.grad(self.margin(logits).sum(), points)
            size = 2.0 * scale * 0.8**step
            if self.norm == "Linf":
                move = gradient.sign()
            elif self.norm == "L2":
                length = torch.linalg.vector_norm(gradient.flatten(2), dim=2).clamp(min=1e-30)
                move = gradient / length.view(*length.shape, *[1] * (self.x.ndim - 1))
            else:
                size_of = gradient.abs().flatten(2)
                top = size_of >= size_of.kthvalue(size_of.shape[2] - 1, dim=2, keepdim=True).values
                move = (gradient.sign().flatten(2) * top).view_as(gradient) / 2
            points = self.inside(points.detach().double() - size * move)
        return points

    def nudge(self, count: int) -> Tensor:
        """Numbers of the worst points moved by one or two neighbours in floating point, or to the ends of the box."""
        points = self.worst.expand(count, *self.worst.shape)
        which = torch.randint(0, 7, points.shape, generator=self.draw)
        for way in (1, 2):
            points = torch.where(which == way, points.nextafter(self.low), points)
            points = torch.where(which == 2 + way, points.nextafter(self.high), points)
        end = torch.where(points < self.x, self.low, self.high)
        return self.inside(torch.where(which == 6, end, points))

    def edges(self, count: int) -> Tensor:
        """The worst points with some of their numbers moved to the edge of two levels of a file in eight bits."""
        step = next(each.scale for each in self.model.modules() if isinstance(each, Quantize))
        points = self.worst.expand(count, *self.worst.shape)
        which = torch.rand(points.shape, generator=self.draw) < 0.5
        return self.inside(torch.where(which, ((points / step).floor() + 0.5) * step, points))

    def round(self, number: int) -> None:
        if self.smoothed is not None:
            self.vote(self.smoothed, number)
            return
        self.ask(self.random(30))
        if isinstance(self.model, MahalanobisKnn):
            targets = self.model.points[torch.randint(len(self.model.points), (30 * len(self.x),), generator=self.draw)]
            away = targets.view(30, *self.x.shape).double() - self.x
            length = torch.linalg.vector_norm(away.flatten(2), dim=2, keepdim=True).clamp(min=1e-12)
            self.ask(self.inside(self.x + self.radii[:, None] * away / length))
        else:
            self.ask(self.descend(6, 8))
        if isinstance(self.model, Twinned):
            self.ask(self.edges(20))
        self.ask(self.nudge(20))
        if number % 4 == 1:
            self.ask(self.nudge(1), BATCHES[1 + number // 4 % 3])

    def vote(self, ask: Callable[[Tensor, int], Tensor], number: int) -> None:
        """Few votes first; many where few do not show that the certified class has most."""
        points = self.random(1)[0] if number % 3 == 0 else self._down_on_average()
        few = ask(points, 200)
        self.tries += len(points)
        share = few.gather(1, self.labels[:, None]).squeeze(1) / 200
        self.least = min(self.least, float(share.min()))
        for i in torch.where(share < 0.7)[0].tolist():
            n = 10_000
            votes = ask(points[i : i + 1], n)[0].tolist()
            own = votes.pop(int(self.labels[i]))
            contradicted = binomial_upper(own, n, CONTRADICTED / 2) < binomial_lower(max(votes), n, CONTRADICTED / 2)
            self.violations += int(contradicted)

    def _down_on_average(self) -> Tensor:
        """Gradient descent on the mean margin under noise, from a random point."""
        points, scale = self.random(1)[0], self.per_ball(self.radii)
        for step in range(4):
            points = points.requires_grad_()
            noisy = points.expand(16, *points.shape).flatten(0, 1)
            value = self.margin(self.logits_under_noise(noisy)).clamp(max=3.0).sum()
            (gradient,) = torch.autograd.grad(value, points)
            move = gradient.sign()
            if self.norm != "Linf":
                move = gradient / torch.linalg.vector_norm(gradient.flatten(1), dim=1).clamp(min=1e-30).view(
                    -1, *[1] * (self.x.ndim - 1)
                )
            points = self.inside((points.detach().double() - 2 * 0.6**step * scale * move)[None])[0]
        return points

    def logits_under_noise(self, rows: Tensor) -> Tensor:
        return self.model(rows + self.sigma * torch.randn(rows.shape)) if self.sigma else self.model(rows)

    def seen(self) -> dict[str, Any]:
        return {
            "certifier": self.certifier,
            "network": self.network,
            "norm": self.norm,
            "balls": len(self.x),
            "largest_radius": float(self.radii.max()),
            "tries": self.tries,
            "violations": self.violations,
            "least_margin" if self.smoothed is None else "least_share": self.least,
            "flipped_beyond": self.beyond,
            "alpha": self.alpha,
            "seconds": round(self.seconds, 1),
        }


def counted(passes: Callable[[Tensor], Tensor]) -> Callable[[Tensor, int], Tensor]:
    """Votes [P, K] of n noisy passes for each of P points."""

    @torch.no_grad()
    def votes(points: Tensor, n: int) -> Tensor:
        found = []
        for point in points:
            winners = passes(point.expand(n, *point.shape)).argmax(1)
            found.append(torch.bincount(winners, minlength=10))
        return torch.stack(found)

    return votes
