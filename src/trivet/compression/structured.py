"""Patterns of whole parts of a layer: filters, input channels, kernels, and rows of kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trivet.compression.pattern import UnitPattern
from trivet.methods import method


@method(title="Structured sparsity", paper="Mao et al., CVPR Workshops 2017", year=2017, legs="small")
@dataclass(frozen=True)
class Structured(UnitPattern):
    """Parts of a layer's weights [out, in, height, width] are kept or dropped whole.

        filter   all weights of an output           channel  all weights of an input
        kernel   those from an input to an output   row      a kernel's weights of one height

    In linear layers, outputs and inputs are the neurons, and kernels and rows are single weights. The filters of the
    last layer are the classes: exclude it, or some will never be predicted. Whole filters and channels can be cut out
    of a network, which then is faster anywhere; kernels and rows need a library that skips them.

    Attributes:
        granularity: "filter", "channel" (of the input), "kernel" or "row".
    """

    granularity: Literal["filter", "channel", "kernel", "row"] = "filter"

    def units(self, scores: Tensor) -> Tensor:
        inside = self._inside(scores.ndim)
        return (scores.sum(inside) if inside else scores).flatten()

    def spread(self, kept: Tensor, shape: torch.Size) -> Tensor:
        inside = self._inside(len(shape))
        reduced = [1 if axis in inside else size for axis, size in enumerate(shape)]
        return kept.reshape(reduced).expand(shape).clone()

    def _inside(self, dimensions: int) -> tuple[int, ...]:
        """The axes along which weights belong to one unit."""
        spatial = tuple(range(2, dimensions))
        return {"filter": (1, *spatial), "channel": (0, *spatial), "kernel": spatial, "row": spatial[-1:]}[
            self.granularity
        ]
