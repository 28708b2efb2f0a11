"""The pattern without a pattern: every weight by itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trivet.compression.pattern import UnitPattern
from trivet.methods import method


@method(title="Unstructured sparsity", legs="small")
@dataclass(frozen=True)
class Unstructured(UnitPattern):
    """Each weight is kept or dropped by itself: the least loss at a density, and no gain in dense arithmetic."""

    def units(self, scores: Tensor) -> Tensor:
        return scores.reshape(-1)

    def spread(self, kept: Tensor, shape: torch.Size) -> Tensor:
        return kept.reshape(shape)
