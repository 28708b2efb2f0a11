"""HARP: how much of each layer stays is learnt beside which of its weights (Zhao & Wressnegger, ICLR 2023)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from math import log
from typing import Any

import torch
from torch import Tensor, nn

from trivet.compression.compression import Compression, Moment, WeightMap
from trivet.compression.hydra import Hydra, ScoredMask
from trivet.compression.pattern import Pattern, UnitPattern
from trivet.compression.unstructured import Unstructured
from trivet.errors import require
from trivet.methods import method

_FLOOR = 0.1  # of the density: the least any layer keeps, "alpha" in the authors' code
_MOST = 0.99  # where a layer's share starts at most, so that its rate is finite
_REACHED = 5e-5  # an excess below this counts as none, as in the authors' code, which rounds to four digits


class RatedMask(ScoredMask):
    """w * m, where m keeps the share k(r) of the weights with the largest |s|, and r learns, too.

        k(r) = floor + (1 - floor) sigmoid(r)

    The gradient passes m as if it were |s| + k(r): with g = d loss / d (w m), that by k is the sum of g * w.
    """

    pressure: Tensor
    reached: Tensor

    def __init__(self, shape: torch.Size, pattern: Pattern, density: float) -> None:
        super().__init__(shape, pattern, density)
        self.floor = _FLOOR * density
        self.rate = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.register_buffer("pressure", torch.zeros(()))
        self.register_buffer("reached", torch.zeros((), dtype=torch.bool))

    def share(self, rate: Tensor) -> Tensor:
        return self.floor + (1 - self.floor) * rate.sigmoid()

    @property
    def mask(self) -> Tensor:
        return self.mask_at(self.rate.detach())

    def mask_at(self, rate: Tensor) -> Tensor:
        """The mask of another rate."""
        # A sigmoid that rounds to one may give a share that rounds above it.
        return self.pattern.keep(self.scores.detach().abs(), min(1.0, float(self.share(rate))))

    def forward(self, weight: Tensor) -> Tensor:
        importance, share = self.scores.abs(), self.share(self.rate)
        return weight * (self.mask + (importance - importance.detach()) + (share - share.detach()))


@method(title="HARP", paper="Zhao & Wressnegger, ICLR 2023", year=2023, legs="robust small")
@dataclass(frozen=True, kw_only=True)
class Harp(Hydra):
    """Learn each layer's density and its scores under the stage's objective, weights frozen.

        min over S, r of L(theta * top_k(r)(|S|)) + gamma_t * max(sum_l n_l k(r_l) / (density * sum_l n_l) - 1, 0)

    In epoch t = 1, 2, … gamma_t = t * gamma, until an epoch ends within the budget; from then on it stays. Every layer
    starts with the share `start` and keeps at least a tenth of `density`. Scores start as HYDRA's. The penalty
    sees the rates alone; under DP-SGD rates are as private as scores.

    Departure: the authors keep the epoch that does best on test records, among those within the budget. Here a layer's
    rates that are above the budget in the end are lowered together until they are within it.

    Promises nothing of its own. Published by others on CIFAR-10 (ResNet-18, AutoAttack, 99 % dropped): 45.5 % against
    38.8 % of HYDRA, from unequal training.

    Attributes:
        density: the share of all weights of the chosen layers that may stay, in (0, 1].
        pattern: what is kept or dropped together; by units, as layers' shares are of any size.
        gamma: the first pressure on the size; at most some epochs should pass before the budget is met.
        start: the share of each layer at first; not below `density`.
    """

    pattern: UnitPattern = field(default_factory=Unstructured)
    gamma: float = 0.01
    start: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.gamma < float("inf"), f"gamma={self.gamma} must be finite and not negative.")
        require(0 < self.start <= 1, f"start={self.start} must lie in (0, 1].")

    def map_for(self, name: str, layer: nn.Module) -> WeightMap:
        weight: Any = layer.weight
        return RatedMask(weight.shape, self.pattern, self.density)

    def begin(self, model: nn.Module) -> None:
        super().begin(model)
        for each in self.maps(model).values():
            each.rate.requires_grad_(True)

    @torch.no_grad()
    def initialise(self, model: nn.Module) -> None:
        super().initialise(model)
        for each in self.maps(model).values():
            share = (min(max(self.start, self.density), _MOST) - each.floor) / (1 - each.floor)
            each.rate.fill_(log(share / (1 - share)))
            each.pressure.zero_()
            each.reached.fill_(False)

    @torch.no_grad()
    def before(self, model: nn.Module, moment: Moment) -> None:
        if not moment.starts_epoch:
            return
        maps = self.maps(model).values()
        within = moment.epoch > 0 and float(self._excess(maps)) <= _REACHED
        for each in maps:
            if within:
                each.reached.fill_(True)
            if not each.reached:
                each.pressure.fill_((moment.epoch + 1) * self.gamma)

    def adjust(self, model: nn.Module, moment: Moment) -> None:
        maps = list(self.maps(model).values())
        with torch.enable_grad():
            penalty = maps[0].pressure * self._excess(maps).clamp_min(0)
        rates = [each.rate for each in maps]
        for rate, gradient in zip(rates, torch.autograd.grad(penalty, rates), strict=True):
            rate.grad = gradient if rate.grad is None else rate.grad + gradient

    @torch.no_grad()
    def report(self, model: nn.Module) -> dict[str, Any]:
        maps = self.maps(model)
        lower = self._lower_by(maps.values())
        excess = float(self._excess(maps.values()))
        kept = {name: int(each.mask_at(each.rate - lower).sum()) for name, each in maps.items()}
        return {"kept": kept, "harp_excess": excess}

    @torch.no_grad()
    def end(self, model: nn.Module) -> Compression:
        maps = self.maps(model).values()
        lower = self._lower_by(maps)
        for each in maps:
            each.rate.sub_(lower)
        return super().end(model)

    def _excess(self, maps: Collection[RatedMask], lower: float = 0.0) -> Tensor:
        """How much more weights there are than the budget, relative to it, with all rates `lower` by so much."""
        counts = [each.scores.numel() for each in maps]
        kept = sum(count * each.share(each.rate - lower) for count, each in zip(counts, maps, strict=True))
        return kept / (self.density * sum(counts)) - 1  # type: ignore[return-value]

    def _lower_by(self, maps: Collection[RatedMask]) -> float:
        """What all rates must be lowered by, so that the budget is met."""
        if float(self._excess(maps)) <= 0:
            return 0.0
        low, high = 0.0, 64.0  # sigmoid(-64) is nothing beside the floors, which together are a tenth of the budget
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if float(self._excess(maps, middle)) > 0 else (low, middle)
        return high
