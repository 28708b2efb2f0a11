"""Masked mapping: weights are put on their levels in two rounds, those nearest first (Yuan et al., 2019)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trivet.compression.compression import Compression, Moment, WeightMap, given
from trivet.compression.levels import Levels
from trivet.compression.projection import Projection
from trivet.errors import require
from trivet.methods import method


class Mapped(WeightMap):
    """The level where `fixed`, and the weight elsewhere."""

    fixed: Tensor
    level: Tensor

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.register_buffer("fixed", torch.zeros(shape, dtype=torch.bool))
        self.register_buffer("level", torch.zeros(shape))

    def forward(self, weight: Tensor) -> Tensor:
        return torch.where(self.fixed, self.level, weight)


@method(title="Masked mapping", paper="Yuan et al., ISLPED 2019", year=2019, legs="small")
@dataclass(frozen=True, kw_only=True)
class MaskedMapping(Compression):
    """Half of each layer's weights, those nearest to their levels, are fixed there; the others train on.

    From the share `second` of the stage on all are fixed, and biases and normalisation train alone. Zeros are pruned
    weights: they are fixed at zero from the start. The paper describes rounds of fixing and retraining; that there are
    two, of a half each, is our choice.

    Attributes:
        projection: the levels.
        second: when the other half follows, as a share of the stage, in (0, 1).
    """

    projection: Projection = field(default_factory=Levels)
    second: float = 0.5

    def __post_init__(self) -> None:
        require(0 < self.second < 1, f"second={self.second} must lie in (0, 1).")

    def map_for(self, name: str, layer: nn.Module) -> WeightMap:
        weight: Any = layer.weight
        return Mapped(weight.shape)

    @torch.no_grad()
    def initialise(self, model: nn.Module) -> None:
        for weight, each in self._pairs(model):
            each.level.copy_(self.projection.project(weight))
            away, pruned = (weight - each.level).abs(), weight == 0
            each.fixed.copy_(pruned | (away <= away[~pruned].median()) if bool((~pruned).any()) else pruned)

    @torch.no_grad()
    def before(self, model: nn.Module, moment: Moment) -> None:
        if moment.fraction >= self.second:
            self._fix_all(model)

    @contextmanager
    def as_shipped(self, model: nn.Module) -> Iterator[None]:
        maps = self.maps(model).values()
        kept = [(each.fixed.clone(), each.level.clone()) for each in maps]
        self._fix_all(model)
        try:
            yield
        finally:
            for each, (fixed, level) in zip(maps, kept, strict=True):
                each.fixed.copy_(fixed)
                each.level.copy_(level)

    def end(self, model: nn.Module) -> Compression:
        self._fix_all(model)
        return self

    @torch.no_grad()
    def _fix_all(self, model: nn.Module) -> None:
        for weight, each in self._pairs(model):
            if bool(each.fixed.all()):
                continue
            # All on one grid: the levels of those fixed first are part of what the scale is fitted to.
            each.level.copy_(self.projection.project(torch.where(each.fixed, each.level, weight)))
            each.fixed.fill_(True)

    def _pairs(self, model: nn.Module) -> Iterator[tuple[Tensor, Mapped]]:
        layers = self.layers(model)
        for name, each in self.maps(model).items():
            yield given(layers[name]), each
