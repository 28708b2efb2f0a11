"""Pointwise: undo changes pixel by pixel, from decisions alone (Schott et al., ICLR 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trivet.errors import require
from trivet.methods import method
from trivet.threats.attack import Attack, Target

_LEVELS, _BISECTIONS = 50, 5


@method(title="Pointwise", paper="Schott et al., ICLR 2019", year=2019, legs="robust")
@dataclass(frozen=True)
class Pointwise(Attack):
    """Salt and pepper until the label is wrong; then give pixels back, one by one, as long as it stays wrong.

    Made for sparse perturbations, and the attack that showed l_1 and l_2 accuracies by gradients on MNIST to be too
    high. It asks for labels alone, so that masked gradients do not hinder it. More and more random pixels are set
    to 0 or 1 (50 levels), every changed pixel is tried at its clean value in random order until none can be given back,
    and the changes that are left are halved 5 times each where that keeps the label wrong. The size of the set plays
    no part in the search: it decides in the end whether the point counts.

    Attributes:
        restarts: independent searches; later ones attack only what still stands.
    """

    restarts: int = 3
    gradient_free: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.restarts >= 1, f"restarts={self.restarts} must be at least 1.")

    @torch.no_grad()
    def search(self, model: Target, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        best, open_ = x.clone(), torch.arange(len(x), device=x.device)
        for _ in range(self.restarts):
            point = salted(model, x[open_], y[open_], generator)
            fell = model.misclassifies(point, y[open_]).nonzero().squeeze(1)
            point[fell] = given_back(model, point[fell], x[open_[fell]], y[open_[fell]], generator)
            won = self.succeeds(model, point, x[open_], y[open_])
            best[open_], open_ = point, open_[~won]
            if not len(open_):
                break
        # What lies outside the set is no point of it, however small the change.
        outside = ~self.threat.contains(best, x)
        best[outside] = x[outside]
        return best


def salted(model: Target, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """`x` with the least salt and pepper, of one draw, that makes its label wrong; `x` itself where none does."""
    noise = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    point, open_ = x.clone(), torch.arange(len(x), device=x.device)
    for level in range(_LEVELS + 1):
        share, here = level / _LEVELS, noise[open_]
        spoilt = x[open_].masked_fill(here < share / 2, 0.0).masked_fill(here > 1 - share / 2, 1.0)
        fell = model.misclassifies(spoilt, y[open_])
        point[open_[fell]], open_ = spoilt[fell], open_[~fell]
        if not len(open_):
            break
    return point


def given_back(model: Target, point: Tensor, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Misclassified `point` [B, ...] nearer to `x`: no single changed pixel of it can be put back any more."""
    flat, clean, shape = point.flatten(1).clone(), x.flatten(1), point.shape
    rows = torch.arange(len(x), device=x.device)

    def wrong(candidate: Tensor) -> Tensor:
        return model.misclassifies(candidate.view(shape), y)

    moved = len(x) > 0
    while moved:
        moved = False
        changed = flat != clean
        lottery = torch.rand(flat.shape, generator=generator, device=x.device).masked_fill(~changed, 2.0)
        for column in lottery.argsort(1).T[: int(changed.sum(1).max())]:
            trial = flat.clone()
            trial[rows, column] = clean[rows, column]
            better = (trial != flat).any(1) & wrong(trial)
            flat[better] = trial[better]
            moved |= bool(better.any())
    order = (flat == clean).to(torch.uint8).argsort(dim=1, stable=True).T
    for column in order[: int((flat != clean).sum(1).max()) if len(x) else 0]:
        near, far = clean[rows, column], flat[rows, column]
        for _ in range(_BISECTIONS):
            middle = (near + far) / 2
            flat[rows, column] = middle
            still = wrong(flat)
            near, far = torch.where(still, near, middle), torch.where(still, middle, far)
        flat[rows, column] = far
    return flat.view(shape)
