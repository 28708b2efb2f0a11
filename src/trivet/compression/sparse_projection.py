"""Sparsity as a projection: of a weight, what a pattern lets stay."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from trivet.compression.pattern import Pattern
from trivet.compression.projection import Projection
from trivet.compression.unstructured import Unstructured
from trivet.errors import require
from trivet.methods import method


@method(title="Sparse weights", legs="small")
@dataclass(frozen=True)
class Sparse(Projection):
    """All weights of a pattern and density. The nearest is the one that keeps the most squares: || w - P(w) || least.

    Attributes:
        density: the share of weights that is kept, in (0, 1].
        pattern: which weights are kept or dropped together.
    """

    density: float = 0.1
    pattern: Pattern = field(default_factory=Unstructured)

    def __post_init__(self) -> None:
        require(0 < self.density <= 1, f"density={self.density} must lie in (0, 1].")

    @torch.no_grad()
    def project(self, weight: Tensor) -> Tensor:
        # In float64, where squares of float32 numbers do not underflow.
        return weight.detach() * self.pattern.keep(weight.double().square(), self.density)
