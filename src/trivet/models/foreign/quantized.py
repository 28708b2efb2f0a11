"""Levels of eight bits as PyTorch layers: rounded as the runtime rounds, gradients straight through.

In files of quantised networks every value is rounded to a level and taken back to a number. The rebuilt network rounds
where the file does, so that its answers are the file's but for values on the edge of two levels, where the arithmetic
of a runtime may fall on the other side. Rounding has no gradient; straight-through estimation (Bengio et al., 2013)
lets it pass where the value is within range, and stops it outside.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

RANGES = {torch.uint8: (0, 255), torch.int8: (-128, 127)}


class Quantize(nn.Module):
    """clamp(round(x / scale) + zero, low, high), ties to even; backward as if it did not round."""

    scale: Tensor
    zero: Tensor

    def __init__(self, scale: Tensor, zero: Tensor, low: int, high: int) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.low, self.high = low, high

    def forward(self, x: Tensor) -> Tensor:
        scaled = x / self.scale
        level = (scaled.round() + self.zero).clamp(self.low, self.high)
        smooth = (scaled + self.zero).clamp(self.low, self.high)
        return level.detach() + (smooth - smooth.detach())  # exactly the level: what is added is zero


class Dequantize(nn.Module):
    """(level - zero) * scale."""

    scale: Tensor
    zero: Tensor

    def __init__(self, scale: Tensor, zero: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)

    def forward(self, level: Tensor) -> Tensor:
        return (level - self.zero) * self.scale
