"""N:M sparsity: of every M weights that lie side by side, N are kept (Mishra et al. 2021; 2:4 runs on GPUs)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from trivet.compression.pattern import Pattern
from trivet.errors import require
from trivet.methods import method


@method(title="N:M sparsity", paper="Mishra et al., 2021", year=2021, legs="small", name="n_m")
@dataclass(frozen=True)
class NM(Pattern):
    """Of each `m` consecutive weights of an output, density * m are kept: 2:4 is `m` 4 at density 0.5.

    Consecutive means along the input channels, position by position of a kernel: the order in which sparse matrix
    units read a convolution stored channels-last. What is left at the end of an output's weights, when their number is
    no multiple of m, is a group that may keep as many, so that such a layer is a little denser than asked for.

    Attributes:
        m: weights to a group.
    """

    m: int = 4

    def __post_init__(self) -> None:
        require(self.m >= 2, f"m={self.m} must be at least 2.")

    def keep(self, scores: Tensor, density: float) -> Tensor:
        kept = round(density * self.m)
        require(
            1 <= kept <= self.m and abs(kept - density * self.m) < 1e-6,
            f"density={density} must keep a whole number of each {self.m} weights, at least one: "
            f"choose 1/{self.m}, 2/{self.m}, ….",
        )
        ordered = scores.movedim(1, -1)
        rows = ordered.flatten(1)
        width = rows.shape[1]
        # What fills up the last group goes before any weight.
        groups = functional.pad(rows, (0, -width % self.m), value=-torch.inf).unflatten(1, (-1, self.m))
        ranks = groups.argsort(dim=-1, stable=True).argsort(dim=-1)
        mask = (ranks >= self.m - kept).flatten(1)[:, :width]
        return mask.reshape(ordered.shape).movedim(-1, 1)
