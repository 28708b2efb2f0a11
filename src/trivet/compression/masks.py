"""Masks: weights held at zero, through training, attacks and certificates, until they are zeros for good."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trivet.compression.compression import Compression, WeightMap
from trivet.methods import method


class Mask(WeightMap):
    """w where m, else 0, with a boolean m shaped as the weight. Dropped weights get no gradient."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return torch.where(self.mask, weight, 0.0)  # not a product: that has negative zeros, which are no zeros on disk


@method(title="Frozen masks", legs="small")
@dataclass(frozen=True, kw_only=True)
class Masks(Compression):
    """Weights that are zero stay zero: for training a network on that somebody has pruned."""

    def map_for(self, name: str, layer: nn.Module) -> WeightMap:
        return Mask(torch.ones_like(layer.weight, dtype=torch.bool))  # type: ignore[arg-type]

    @torch.no_grad()
    def initialise(self, model: nn.Module) -> None:
        layers = self.layers(model)
        for name, each in self.maps(model).items():
            each.mask.copy_(layers[name].weight != 0)
