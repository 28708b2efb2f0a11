"""The boundary attack: a random walk towards the input along the decision boundary (Brendel et al., ICLR 2018)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from trivet.errors import require
from trivet.methods import method
from trivet.threats.attack import Attack, Target
from trivet.threats.threat import batch_norms

_DRAWS, _HALVINGS = 100, 10
_FIRST, _MOST, _STILL = 0.1, 0.5, 1e-7
_WINDOW, _FACTOR, _FEW, _MANY = 10, 1.5, 0.2, 0.5


@method(title="Boundary attack", paper="Brendel, Rauber & Bethge, ICLR 2018", year=2018, legs="robust")
@dataclass(frozen=True)
class Boundary(Attack):
    """Walk from a misclassified point towards `x`, and never step where the label is right. It asks for labels alone.

    A step at distance r from `x` draws a Gaussian direction orthogonal to the line to `x`, goes `sideways` * r along
    it, returns to the sphere of radius r and to the box, and then comes nearer to `x` by `towards` * r. A point is
    taken if it is misclassified and nearer, so that the distance never grows. Both lengths begin at 0.1 and follow the
    boundary, input by input. Over 10 questions, both are multiplied by 1.5 where more than half of the points on the
    sphere were misclassified, and divided by 1.5 where fewer than a fifth were; likewise `towards` alone, at most 0.5,
    by the points nearer to `x`. Those are asked about only where the point on the sphere was misclassified, so that a
    step costs one or two questions. The walk ends when `towards` falls below 1e-7.

    It starts from uniform noise (the first of 100 draws that is misclassified), or where no draw is from an input
    of the same batch that has another label, and is drawn to the boundary by halving the way to `x` ten times. An input
    for which neither is found is not attacked. A model that needs single labels only can be attacked thus, whatever its
    gradients or scores say. The walk can end at a boundary that is not the nearest: the distance is an upper bound.

    Departures: the authors' code averages over 100 and 30 questions and starts with lengths of 0.01. On scikit-learn's
    digits (two small networks, 1000 questions for each of 100 inputs, one seed) mean distances were 0.58 and 0.74 with
    10 questions and 0.1, against 0.71 and 0.89 with 30 questions and 0.01. Tramer & Boneh (NeurIPS 2019) try up to 25
    directions in one step; here each direction is a step.

    Attributes:
        steps: of each walk; 5000 with up to 25 directions each in Tramer & Boneh.
        restarts: independent walks; later ones attack only what still stands.
    """

    steps: int = 5000
    restarts: int = 1
    gradient_free: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(
            self.threat.norm == "L2",
            f"threat={self.threat.norm}: the boundary attack minimises the l_2 norm; choose l2.",
        )
        for name in ("steps", "restarts"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1.")

    def search(self, model: Target, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.threat.project(self._closest(model, x, y, generator, self.threat.eps)[0], x)

    def nearest(
        self, model: Target, x: Tensor, y: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """The nearest misclassified points [B, ...] found at any distance, and their l_2 distance [B].

        Where none was found, the point is `x` and the distance infinite. The radius of `threat` plays no part.
        """
        return self._closest(model, x, y, generator, 0.0)

    @torch.no_grad()
    def _closest(
        self, model: Target, x: Tensor, y: Tensor, generator: torch.Generator | None, radius: float
    ) -> tuple[Tensor, Tensor]:
        """The nearest points of all walks and their distance; a walk ends at a point of the set if it has a radius."""
        best, reach = x.clone(), torch.full_like(y, torch.inf, dtype=x.dtype)
        open_ = torch.arange(len(x), device=x.device)
        for _ in range(self.restarts):
            walk = _Walk.begun(model, x[open_], y[open_], generator)
            for _ in range(self.steps):
                walk.pause(radius)
                if not len(walk.row):
                    break
                walk.step(model, generator)
            distance = batch_norms(walk.point - walk.x, 2).flatten().masked_fill(~walk.started, torch.inf)
            closer = distance < reach[open_]
            best[open_[closer]], reach[open_[closer]] = walk.point[closer], distance[closer]
            if radius:
                open_ = open_[~self.threat.contains(best[open_], x[open_]) | reach[open_].isinf()]
                if not len(open_):
                    break
        return best, reach


@dataclass
class _Tally:
    """How often, of the questions asked since its last verdict, the answer was a wrong label; for each input."""

    asked: Tensor
    wrong: Tensor

    @classmethod
    def empty(cls, like: Tensor) -> _Tally:
        return cls(torch.zeros_like(like), torch.zeros_like(like))

    def factor(self, row: Tensor, asked: Tensor, wrong: Tensor) -> Tensor:
        """Count the questions `asked` [R] about inputs `row` [R]; the factor [R] for the lengths, 1 until the window
        is full."""
        self.asked[row] += asked
        self.wrong[row] += wrong
        full = self.asked[row] >= _WINDOW
        share = self.wrong[row] / self.asked[row].clamp(min=1)
        factor = torch.ones_like(share)
        factor[full & (share > _MANY)] = _FACTOR
        factor[full & (share < _FEW)] = 1 / _FACTOR
        self.asked[row[full]] = self.wrong[row[full]] = 0.0
        return factor


@dataclass
class _Walk:
    """The walks of a batch.

    Attributes:
        x, y, point: [B, ...], [B], [B, ...]; `point` is misclassified where `started` [B], `x` elsewhere.
        row: [R] the inputs that still walk.
        sideways, towards: [B] the lengths of the next step as shares of the distance.
    """

    x: Tensor
    y: Tensor
    point: Tensor
    started: Tensor
    row: Tensor
    sideways: Tensor
    towards: Tensor
    sphere: _Tally = field(init=False)
    nearer: _Tally = field(init=False)

    def __post_init__(self) -> None:
        self.sphere, self.nearer = (_Tally.empty(self.sideways) for _ in range(2))

    @classmethod
    def begun(cls, model: Target, x: Tensor, y: Tensor, generator: torch.Generator | None) -> _Walk:
        point = _halved(model, _far(model, x, y, generator), x, y)
        started = model.misclassifies(point, y) if len(x) else torch.zeros_like(y, dtype=torch.bool)
        lengths = (torch.full_like(y, _FIRST, dtype=x.dtype) for _ in range(2))
        return cls(x, y, point, started, started.nonzero().squeeze(1), *lengths)

    def pause(self, radius: float) -> None:
        """Stop the walks that are near enough, and those that do not come nearer any more."""
        distance = torch.linalg.vector_norm(
            (self.point[self.row].double() - self.x[self.row].double()).flatten(1), dim=1
        )
        self.row = self.row[(distance > radius) & (self.towards[self.row] >= _STILL)]

    def step(self, model: Target, generator: torch.Generator | None) -> None:
        """One direction for each input that walks: a point on the sphere, and one nearer to `x` where that is wrong."""
        row, y = self.row, self.y[self.row]
        x, away = self.x[row].flatten(1), (self.point[row] - self.x[row]).flatten(1)
        distance = away.norm(dim=1, keepdim=True)
        sideways, towards = self.sideways[row, None], self.towards[row, None]
        noise = torch.empty_like(away).normal_(generator=generator)
        noise -= (noise * away).sum(1, keepdim=True) / distance**2 * away
        noise *= sideways * distance / noise.norm(dim=1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
        around = (x + (away + noise) / (1 + sideways**2).sqrt()).clamp(0.0, 1.0)
        # Clipping may have brought the point nearer already; what is missing is all that is gone.
        left = (around - x).norm(dim=1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
        inwards = (x + ((1 - towards) * distance / left).clamp(max=1.0) * (around - x)).clamp(0.0, 1.0)
        around, inwards = (each.view(len(row), *self.x.shape[1:]) for each in (around, inwards))
        on_sphere = model.misclassifies(around, y)
        within = torch.zeros_like(on_sphere)
        if bool(on_sphere.any()):
            within[on_sphere] = model.misclassifies(inwards[on_sphere], y[on_sphere])
        taken = within & (batch_norms(inwards - self.x[row], 2).flatten() < distance.squeeze(1))
        self.point[row[taken]] = inwards[taken]
        both = self.sphere.factor(row, torch.ones_like(on_sphere), on_sphere)
        alone = self.nearer.factor(row, on_sphere, within)
        self.sideways[row] *= both
        self.towards[row] = (self.towards[row] * both * alone).clamp(max=_MOST)


def _far(model: Target, x: Tensor, y: Tensor, generator: torch.Generator | None) -> Tensor:
    """A misclassified point for each input, however far; `x` where none was found."""
    point, open_ = x.clone(), torch.arange(len(x), device=x.device)
    for _ in range(_DRAWS):
        if not len(open_):
            return point
        noise = torch.rand((len(open_), *x.shape[1:]), generator=generator, device=x.device, dtype=x.dtype)
        wrong = model.misclassifies(noise, y[open_])
        point[open_[wrong]], open_ = noise[wrong], open_[~wrong]
    lots = torch.rand(len(open_), len(x), generator=generator, device=x.device)
    other = lots.masked_fill(y[open_, None] == y[None], -1.0).argmax(1)  # of its own label only if there is no other
    wrong = model.misclassifies(x[other], y[open_]) if len(open_) else torch.zeros_like(open_, dtype=torch.bool)
    point[open_[wrong]] = x[other[wrong]]
    return point


def _halved(model: Target, far: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The misclassified points `far` drawn towards `x` as long as they stay misclassified."""
    near = x
    for _ in range(_HALVINGS if len(x) else 0):
        middle = (near + far) / 2
        wrong = model.misclassifies(middle, y).view(-1, *[1] * (x.ndim - 1))
        near, far = torch.where(wrong, near, middle), torch.where(wrong, middle, far)
    return far
