"""Pruning at random: what every other choice of weights has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trivet.compression.pruner import LossOf, Pruner, weights_of
from trivet.methods import method


@method(title="Random pruning", legs="small")
@dataclass(frozen=True)
class Random(Pruner):
    """Scores drawn uniformly from [0, 1). Reads neither records nor weights."""

    def score(
        self,
        model: nn.Module,
        names: Sequence[str],
        input_shape: tuple[int, ...],
        losses: Sequence[LossOf],
        draw: torch.Generator,
    ) -> dict[str, Tensor]:
        return {
            name: torch.rand(weight.shape, generator=draw).to(weight)
            for name, weight in weights_of(model, names).items()
        }
