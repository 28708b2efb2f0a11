"""Layers that mix their inputs linearly: fully connected, convolutions, average pooling."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import grad

from trivet.certify.bounds.interval import Norm, dual_norm
from trivet.certify.bounds.layer import Affine

_CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_BACKWARD: dict[int, Callable[..., Tensor]] = {
    1: grad.conv1d_input,
    2: grad.conv2d_input,
    3: grad.conv3d_input,
}


@dataclass(frozen=True, eq=False)
class Linear(Affine):
    """x W^T + b over the last axis, for weight [out, in]."""

    weight: Tensor
    bias: Tensor | None = None

    @property
    def operations(self) -> int:
        return self.weight.shape[1] + 1

    def linear(self, *inputs: Tensor) -> Tensor:
        return F.linear(inputs[0], self.weight)

    def spread(self, *inputs: Tensor) -> Tensor:
        return F.linear(inputs[0], self.weight.abs())

    def constant(self) -> Tensor | None:
        return self.bias

    def transposed(self, rows: Tensor, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
        return (rows @ self.weight,)

    def row_norms(self, gain: Tensor, norm: Norm) -> Tensor | None:
        return dual_norm(self.weight * gain[:1], norm)[None] if gain.ndim == 2 else None

    def __call__(self, *inputs: Tensor) -> Tensor:
        return F.linear(inputs[0], self.weight, self.bias)


@dataclass(frozen=True, eq=False)
class Convolution(Affine):
    """A convolution over one to three axes, padded with zeros; weight [out, in / groups, *kernel]."""

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def operations(self) -> int:
        return math.prod(self.weight.shape[1:]) + 1

    def linear(self, *inputs: Tensor) -> Tensor:
        return self._convolve(inputs[0], self.weight)

    def spread(self, *inputs: Tensor) -> Tensor:
        return self._convolve(inputs[0], self.weight.abs())

    def constant(self) -> Tensor | None:
        return None if self.bias is None else self.bias.view(-1, *[1] * len(self.stride))

    def transposed(self, rows: Tensor, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
        size = (len(rows), *shapes[0])
        backward = _BACKWARD[len(self.stride)]
        return (backward(size, self.weight, rows, self.stride, self.padding, self.dilation, self.groups),)

    def row_norms(self, gain: Tensor, norm: Norm) -> Tensor | None:
        if norm == "L2":
            return self._convolve(gain[:1].square(), self.weight.square()).clamp(min=0.0).sqrt()
        # Of each output's weights the largest, as if it met the largest gain.
        shape = self._convolve(gain[:1], self.weight)
        return self.weight.abs().flatten(1).amax(1).view(-1, *[1] * len(self.stride)) * gain.amax() + 0 * shape

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self._convolve(inputs[0], self.weight, self.bias)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return _CONVOLVE[len(self.stride)](x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


@dataclass(frozen=True, eq=False)
class Averaging(Affine):
    """Means of `terms` values, or of fewer where a window sticks out: average pooling, and means over axes.

    `mean` is a linear function without negative coefficients of a batch [B, ...].
    """

    mean: Callable[[Tensor], Tensor]
    terms: int

    @property
    def operations(self) -> int:
        return self.terms + 2

    def linear(self, *inputs: Tensor) -> Tensor:
        return self.mean(inputs[0])
