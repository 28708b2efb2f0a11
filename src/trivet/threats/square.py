"""Square: random search with square-shaped changes, from scores alone (Andriushchenko et al., ECCV 2020)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trivet.errors import require
from trivet.methods import method
from trivet.threats.attack import Attack, Target
from trivet.threats.losses import margin
from trivet.threats.threat import ThreatModel, batch_norms

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Queries after which the area of the squares is halved."""


@method(title="Square", paper="Andriushchenko et al., ECCV 2020", year=2020, legs="robust")
@dataclass(frozen=True)
class Square(Attack):
    """Propose a change in a random square window, keep it if the margin gives way. No gradient is asked for.

    A query proposes the same window to all images of a batch. Windows reach the last row and column, which the authors'
    code leaves out. Inputs must be images [B, C, H, W].

    Attributes:
        queries: proposals for each image.
        restarts: independent searches; later ones attack only what still stands.
        p_init: share of the image that the first squares cover.
    """

    queries: int = 5000
    restarts: int = 1
    p_init: float = 0.8
    gradient_free: ClassVar[bool] = True

    def __post_init__(self) -> None:
        norm = self.threat.norm
        require(norm in _PROPOSALS, f"Square knows the l_inf, l_2 and l_1 geometry, not {norm}; choose linf, l2 or l1.")
        require(self.queries >= 0, f"queries={self.queries} must not be negative.")
        require(self.restarts >= 1, f"restarts={self.restarts} must be at least 1.")
        require(0 < self.p_init <= 1, f"p_init={self.p_init} must lie in (0, 1].")

    def search(self, model: Target, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        require(x.ndim == 4, f"Square needs images [B, C, H, W], got inputs of shape {tuple(x.shape)}.")
        best, open_ = x.clone(), torch.arange(len(x), device=x.device)
        for _ in range(self.restarts):
            best[open_], won = self._restart(model, x[open_], y[open_], generator)
            open_ = open_[~won]
            if not len(open_):
                break
        return best

    @torch.no_grad()
    def _restart(self, model: Target, x: Tensor, y: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """The points of greatest margin [B, ...] after `queries` proposals, and which are verified successes [B]."""
        result, won, row = x.clone(), torch.zeros_like(y, dtype=torch.bool), torch.arange(len(x), device=x.device)
        proposal = _PROPOSALS[self.threat.norm](self.threat, x, generator)
        places = torch.rand(self.queries, 4, generator=generator, device=x.device).tolist()
        point = proposal.start()
        lead = margin(model(point), y)
        for query in range(self.queries + 1):
            # Negated comparisons, so that NaN, which no margin is smaller than, counts as a gain and is looked into.
            if bool((~(lead < 0)).any()):
                beaten = (~(lead < 0)).nonzero().squeeze(1)
                beaten = beaten[self.succeeds(model, point[beaten], proposal.x[beaten], y[beaten])]
                result[row[beaten]], won[row[beaten]] = point[beaten], True
                kept = torch.ones_like(y, dtype=torch.bool).index_fill_(0, beaten, False).nonzero().squeeze(1)
                row, point, lead, y = row[kept], point[kept], lead[kept], y[kept]
                proposal.keep(kept)
            if query == self.queries or not len(row):
                break
            area = self.p_init / 2 ** sum(query > halving for halving in _HALVINGS)
            proposed = proposal.change(point, area, places[query])
            proposed_lead = margin(model(proposed), y)
            better = ~(proposed_lead <= lead)
            point = torch.where(better.view(-1, 1, 1, 1), proposed, point)
            lead = torch.where(better, proposed_lead, lead)
        result[row] = point
        return result, won


class _Proposal(ABC):
    """Where the search starts and what it tries next, around images `x` [B, C, H, W]."""

    def __init__(self, threat: ThreatModel, x: Tensor, generator: torch.Generator | None) -> None:
        self.threat, self.x, self.generator = threat, x, generator

    @abstractmethod
    def start(self) -> Tensor:
        """The first points of the set."""

    @abstractmethod
    def change(self, point: Tensor, area: float, place: list[float]) -> Tensor:
        """`point` with windows of about `area` of the image changed; `place` are four uniform numbers to put them."""

    def keep(self, kept: Tensor) -> None:
        """Go on with the images at the indices `kept` only."""
        self.x = self.x[kept]

    def signs(self, *shape: int) -> Tensor:
        """Fair random signs."""
        coins = torch.rand(shape, generator=self.generator, device=self.x.device)
        return torch.where(coins < 0.5, -1.0, 1.0).to(self.x.dtype)

    def window(self, side: int, row: float, column: float) -> tuple[slice, slice]:
        """The square window of `side` pixels at a uniformly random position, from two uniform numbers."""
        height, width = self.x.shape[2:]
        top, left = int(row * (height - side + 1)), int(column * (width - side + 1))
        return slice(top, top + side), slice(left, left + side)


class _Corners(_Proposal):
    """l_inf: every pixel at one end of its interval; vertical stripes first, then windows of one colour."""

    def __init__(self, threat: ThreatModel, x: Tensor, generator: torch.Generator | None) -> None:
        super().__init__(threat, x, generator)
        self.low, self.high = threat.project(x - 1, x), threat.project(x + 1, x)

    def start(self) -> Tensor:
        batch, channels, _, width = self.x.shape
        return torch.where(self.signs(batch, channels, 1, width) > 0, self.high, self.low)

    def change(self, point: Tensor, area: float, place: list[float]) -> Tensor:
        channels, height, width = self.x.shape[1:]
        side = min(max(round(math.sqrt(area * height * width)), 1), height, width)
        rows, columns = self.window(side, *place[:2])
        up = self.signs(channels, 1, 1) > 0
        changed = point.clone()
        changed[:, :, rows, columns] = torch.where(up, self.high[:, :, rows, columns], self.low[:, :, rows, columns])
        return changed

    def keep(self, kept: Tensor) -> None:
        super().keep(kept)
        self.low, self.high = self.low[kept], self.high[kept]


class _Bumps(_Proposal):
    """l_2 and l_1: the budget of one window moves to another, in the shape of a bump with a rise and a dip."""

    def __init__(self, threat: ThreatModel, x: Tensor, generator: torch.Generator | None) -> None:
        super().__init__(threat, x, generator)
        self.p = 2.0 if threat.norm == "L2" else 1.0

    def start(self) -> Tensor:
        batch, channels, height, width = self.x.shape
        side = max(min(height, width) // 5, 1)
        delta = torch.zeros_like(self.x)
        for top in range((height % side) // 2, height - side + 1, side):
            for left in range((width % side) // 2, width - side + 1, side):
                tile = self.bump(side) * self.signs(batch, channels, 1, 1)
                delta[:, :, top : top + side, left : left + side] = tile
        return self.within(delta)

    def change(self, point: Tensor, area: float, place: list[float]) -> Tensor:
        batch, channels, height, width = self.x.shape
        side = max(round(math.sqrt(area * height * width)), 3)
        side = min(side + 1 - side % 2, height, width)
        to, source = self.window(side, *place[:2]), self.window(side, *place[2:])
        delta = point - self.x
        either = torch.zeros(height, width, dtype=self.x.dtype, device=self.x.device)
        either[to], either[source] = 1.0, 1.0
        freed = self.lengths(delta * either) ** self.p
        unused = (self.threat.eps**self.p - batch_norms(delta, self.p) ** self.p).clamp(min=0.0)
        old = delta[(..., *to)]
        fresh = self.bump(side) * self.signs(batch, channels, 1, 1) + old / self.lengths(old).clamp(min=1e-12)
        budget = (unused / channels + freed) ** (1 / self.p)
        fresh = fresh * (budget / self.lengths(fresh).clamp(min=1e-12))
        delta[(..., *source)] = 0.0
        delta[(..., *to)] = fresh if self.p == 2 else fresh * channels
        return self.within(delta)

    def within(self, delta: Tensor) -> Tensor:
        """Points of the set in the direction `delta`: at full length under l_2, as it is under l_1."""
        if self.p == 2:
            delta = delta * (2 * self.threat.eps / batch_norms(delta, 2).clamp(min=1e-12))
        return self.threat.project(self.x + delta, self.x)

    def lengths(self, delta: Tensor) -> Tensor:
        """The p-norm of every channel, [B, C, 1, 1]."""
        return torch.linalg.vector_norm(delta, ord=self.p, dim=(2, 3), keepdim=True)

    def bump(self, side: int) -> Tensor:
        """[side, side] of p-norm 1: a rise in one half, a dip in the other, in one of the two orientations."""
        upper, lower = self.pyramid(side // 2, side), self.pyramid(side - side // 2, side)
        shape = torch.cat((upper, -lower))
        shape = shape / torch.linalg.vector_norm(shape, ord=self.p)
        return shape.T if self.signs(1).item() > 0 else shape

    def pyramid(self, height: int, width: int) -> Tensor:
        """Sum over k of centred squares of half-width k, weighted 1 / (k + 1)^2 (l_2) or ^4 (l_1); of p-norm 1."""
        rows = (torch.arange(height, device=self.x.device) - height // 2).abs()
        columns = (torch.arange(width, device=self.x.device) - width // 2).abs()
        ring = torch.maximum(rows[:, None], columns)
        weights = 1 / torch.arange(1, max(height, width) // 2 + 2, device=self.x.device) ** (2 if self.p == 2 else 4)
        shape = weights.flip(0).cumsum(0).flip(0)[ring].to(self.x.dtype)
        return shape / torch.linalg.vector_norm(shape, ord=self.p) if height else shape


_PROPOSALS: dict[str, type[_Proposal]] = {"Linf": _Corners, "L2": _Bumps, "L1": _Bumps}
