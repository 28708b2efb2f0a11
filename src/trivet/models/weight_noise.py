"""Layers whose weights carry fresh Gaussian noise in every training pass, so that training seeks flat places."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trivet.errors import require


class NoisyLinear(nn.Linear):
    """A linear layer of W + std N(0, I) and b + std N(0, I) in training mode; the plain layer in eval mode.

    The noise depends on no record, so per-record gradients stay per-record, and a private rule pays nothing for it.
    By itself it gives no privacy at all: the mean weights are what is trained and saved.
    """

    def __init__(self, inputs: int, outputs: int, std: float) -> None:
        super().__init__(inputs, outputs)
        self.std = std

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, _noised(self.weight, self), _noised(self.bias, self))


class NoisyConv2d(nn.Conv2d):
    """The same for a convolution."""

    def __init__(self, inputs: int, outputs: int, kernel: int, std: float, padding: int = 0) -> None:
        super().__init__(inputs, outputs, kernel, padding=padding)
        self.std = std

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else _noised(self.bias, self)
        return self._conv_forward(input, _noised(self.weight, self), bias)


def _noised(tensor: Tensor, layer: NoisyLinear | NoisyConv2d) -> Tensor:
    return tensor + layer.std * torch.randn_like(tensor) if layer.training else tensor


def linear(inputs: int, outputs: int, std: float) -> nn.Linear:
    """A linear layer with weight noise, or the plain one where `std` is 0."""
    require(std >= 0, f"weight_noise={std} must not be negative.")
    return NoisyLinear(inputs, outputs, std) if std else nn.Linear(inputs, outputs)


def convolution(inputs: int, outputs: int, kernel: int, std: float, padding: int = 0) -> nn.Conv2d:
    """A convolution with weight noise, or the plain one where `std` is 0."""
    require(std >= 0, f"weight_noise={std} must not be negative.")
    if std:
        return NoisyConv2d(inputs, outputs, kernel, std, padding)
    return nn.Conv2d(inputs, outputs, kernel, padding=padding)
