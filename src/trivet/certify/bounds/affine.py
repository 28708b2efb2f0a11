"""Layers that mix their inputs linearly: fully connected, convolutions, average pooling."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input

from trivet.certify.bounds.interval import Norm, dual_norm
from trivet.certify.bounds.layer import Affine, Layer
from trivet.certify.bounds.moving import Reshaping, Scale

_CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
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

    def scaled(self, scale: Scale) -> Linear | None:
        """This layer and `scale` as one, if `scale` has a factor for each output."""
        if scale.factor.shape != self.weight.shape[:1]:
            return None
        return Linear(*_scaled(self.weight, self.bias, scale))


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
        if self._by_hand(rows):
            return (self._pulled(rows, shapes[0]),)
        # What the stride leaves over at the end of each axis has no weight, but a place.
        window = zip(
            shapes[0][1:], rows.shape[2:], self.weight.shape[2:], self.stride, self.padding, self.dilation, strict=True
        )
        left = [
            size - ((out - 1) * step - 2 * pad + dilate * (kernel - 1) + 1)
            for size, out, kernel, step, pad, dilate in window
        ]
        transposed = _TRANSPOSED[len(self.stride)]
        return (transposed(rows, self.weight, None, self.stride, self.padding, left, self.groups, self.dilation),)

    def _by_hand(self, rows: Tensor) -> bool:
        """Where PyTorch has the same product faster than by its transposed convolution."""
        plain = len(self.stride) == 2 and rows.device.type == "cpu" and not torch.is_grad_enabled()
        return plain and (rows.dtype == torch.float64 or (self.weight.shape[1] == 1 and self.groups == 1))

    def _pulled(self, rows: Tensor, shape: torch.Size) -> Tensor:
        if rows.dtype == torch.float64:  # 1.4 to 2.5 times, measured on an x86 core
            size = (len(rows), *shape)
            return conv2d_input(size, self.weight, rows, self.stride, self.padding, self.dilation, self.groups)
        # Of one channel, twice.
        parts = self.weight.flatten(1).T @ rows.flatten(2)
        return F.fold(parts, shape[1:], self.weight.shape[2:], self.dilation, self.padding, self.stride)

    def row_norms(self, gain: Tensor, norm: Norm) -> Tensor | None:
        if norm == "L2":
            return self._convolve(gain[:1].square(), self.weight.square()).clamp(min=0.0).sqrt()
        # Of each output's weights the largest, as if it met the largest gain.
        shape = self._convolve(gain[:1], self.weight)
        return self.weight.abs().flatten(1).amax(1).view(-1, *[1] * len(self.stride)) * gain.amax() + 0 * shape

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self._convolve(inputs[0], self.weight, self.bias)

    def scaled(self, scale: Scale) -> Convolution | None:
        """This layer and `scale` as one, if `scale` has a factor for each channel."""
        if scale.factor.shape != (len(self.weight), *[1] * len(self.stride)):
            return None
        weight, bias = _scaled(self.weight, self.bias, scale)
        return replace(self, weight=weight, bias=bias)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return _CONVOLVE[len(self.stride)](x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


def _scaled(weight: Tensor, bias: Tensor | None, scale: Scale) -> tuple[Tensor, Tensor | None]:
    factor, shift = scale.factor.flatten(), None if scale.shift is None else scale.shift.flatten()
    bias = shift if bias is None else bias * factor if shift is None else bias * factor + shift
    return weight * factor.view(-1, *[1] * (weight.ndim - 1)), bias


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


def merged(layers: Sequence[Layer], inputs: Sequence[tuple[int, ...]]) -> list[Layer]:
    """The same layers, each BatchNorm taken into the layer before it where nothing else reads that one.

    The node between them then has the value of the node after them.
    """
    found, readers = list(layers), Counter(node for before in inputs for node in before)
    for i, (layer, before) in enumerate(zip(layers, inputs, strict=True)):
        node = before[0]
        if isinstance(layer, Scale) and node and readers[node] == 1:
            earlier = found[node - 1]
            whole = earlier.scaled(layer) if isinstance(earlier, (Linear, Convolution)) else None
            if whole is not None:
                found[node - 1], found[i] = whole, Reshaping(lambda x: x)
    return found
