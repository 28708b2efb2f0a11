"""Crossbars: how a layer's weights lie on tiles of memristors, and the patterns that free parts of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trivet.compression.pattern import UnitPattern
from trivet.errors import require
from trivet.methods import method


@method(
    title="Crossbar blocks",
    paper="Yuan et al., ISLPED 2019",
    year=2019,
    legs="small",
)
@dataclass(frozen=True)
class CrossbarBlocks(UnitPattern):
    """What frees parts of crossbars: of a weight [O, I, …] as a matrix of O outputs by k = I kh kw inputs.

    A tile takes `rows` inputs and `columns` outputs. "block_column": one input for all outputs of a tile column, whose
    word line is free. "tile": all `rows` x `columns` weights of a tile. Parts at the edge are units like any other.

    Attributes:
        granularity: "block_column" or "tile".
        rows, columns: of a tile; 128 x 64 in the paper for VGG-16 and ResNet-18, 32 x 32 for LeNet-5.
    """

    granularity: Literal["block_column", "tile"] = "block_column"
    rows: int = 128
    columns: int = 64

    def __post_init__(self) -> None:
        require(self.rows >= 1, f"rows={self.rows} must be at least 1.")
        require(self.columns >= 1, f"columns={self.columns} must be at least 1.")

    def units(self, scores: Tensor) -> Tensor:
        return self._blocks(scores).sum((1, 3)).flatten()

    def spread(self, kept: Tensor, shape: torch.Size) -> Tensor:
        down, across, height, width = self._grid(shape)
        blocks = kept.reshape(down, 1, across, 1).expand(down, height, across, width)
        return blocks.reshape(down * height, across * width)[: shape[0], : shape[1:].numel()].reshape(shape)

    def _grid(self, shape: torch.Size) -> tuple[int, int, int, int]:
        """Blocks down the outputs and across the inputs, and the outputs and inputs of one."""
        width = 1 if self.granularity == "block_column" else self.rows
        return ceil(shape[0] / self.columns), ceil(shape[1:].numel() / width), self.columns, width

    def _blocks(self, weight: Tensor) -> Tensor:
        down, across, height, width = self._grid(weight.shape)
        matrix = weight.flatten(1)
        missing = (0, across * width - matrix.shape[1], 0, down * height - matrix.shape[0])
        return F.pad(matrix, missing).reshape(down, height, across, width)


@dataclass(frozen=True)
class Tiles:
    """How many tiles a layer takes: with all weights, and with those left, packed together."""

    dense: int
    left: int


def tiles_of(weight: Tensor, rows: int = 128, columns: int = 64) -> Tiles:
    """Tiles of a weight [O, I, …]. Outputs without weights go first; each tile column then has the inputs it needs."""
    matrix = weight.detach().flatten(1) != 0
    outputs, inputs = matrix.shape
    dense = ceil(outputs / columns) * ceil(inputs / rows)
    return Tiles(dense, sum(ceil(int(part.any(0).sum()) / rows) for part in _columns(matrix, columns)))


def _columns(matrix: Tensor, columns: int) -> Iterator[Tensor]:
    yield from matrix[matrix.any(1)].split(columns)
