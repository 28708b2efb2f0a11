"""Normalisation as the first layer of a model, so that inputs stay in [0, 1] and every radius means pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trivet.errors import require


class Normalize(nn.Module):
    """(x - mean) / std per channel: [B, C, H, W] in [0, 1] to roughly zero mean and unit variance.

    `mean` and `std` are buffers [C, 1, 1]: they are saved with the weights, and no optimiser moves them.

    Raises:
        BadValue: lengths that differ, or a std that is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        require(len(mean) == len(std), f"mean has {len(mean)} values and std {len(std)}; give one of each per channel.")
        require(all(map(math.isfinite, mean)), f"mean={list(mean)} must be finite.")
        require(
            all(0 < s < math.inf for s in std), f"std={list(std)} must be positive; use 1 to leave a channel alone."
        )
        self.register_buffer("mean", torch.tensor(list(mean)).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(list(std)).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


def normalization(channels: int, mean: Sequence[float] | None, std: Sequence[float] | None) -> nn.Module:
    """The first layer of every network here: `Normalize`, or the identity where neither `mean` nor `std` is given."""
    if mean is None and std is None:
        return nn.Identity()
    layer = Normalize(mean or [0.0] * channels, std or [1.0] * channels)
    require(
        len(layer.mean) == channels, f"mean and std have {len(layer.mean)} values, but inputs have {channels} channels."
    )
    return layer
