"""Transposed convolutions: the layers of decoders, whose transpose is a convolution."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trivet.certify.bounds.interval import Norm
from trivet.certify.bounds.layer import Affine

_CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@dataclass(frozen=True, eq=False)
class TransposedConvolution(Affine):
    """The transpose of a convolution over one to three axes, with a bias; weight [in, out / groups, *kernel].

    `left` is what is added at the end of each output axis (PyTorch's output_padding).
    """

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    left: tuple[int, ...]
    groups: int
    dilation: tuple[int, ...]

    @property
    def operations(self) -> int:
        # At most every input channel of the group, through every place of the kernel.
        return len(self.weight) // self.groups * math.prod(self.weight.shape[2:]) + 1

    def linear(self, *inputs: Tensor) -> Tensor:
        return self._applied(inputs[0], self.weight)

    def spread(self, *inputs: Tensor) -> Tensor:
        return self._applied(inputs[0], self.weight.abs())

    def constant(self) -> Tensor | None:
        return None if self.bias is None else self.bias.view(-1, *[1] * len(self.stride))

    def transposed(self, rows: Tensor, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
        convolve = _CONVOLVE[len(self.stride)]
        found = convolve(rows, self.weight, None, self.stride, self.padding, self.dilation, self.groups)
        # With much added at the end the convolution goes on where no input was.
        for axis, size in enumerate(shapes[0][1:], 2):
            found = found.narrow(axis, 0, size)
        return (found,)

    def row_norms(self, gain: Tensor, norm: Norm) -> Tensor | None:
        if norm == "L2":
            return self._applied(gain[:1].square(), self.weight.square()).clamp(min=0.0).sqrt()
        # Of each output channel's weights the largest, as if it met the largest gain.
        shape = self._applied(gain[:1], self.weight)
        largest = self.weight.abs().unflatten(0, (self.groups, -1)).flatten(3).amax((1, 3)).flatten()
        return largest.view(-1, *[1] * len(self.stride)) * gain.amax() + 0 * shape

    def _applied(self, x: Tensor, weight: Tensor) -> Tensor:
        transposed = _TRANSPOSED[len(self.stride)]
        return transposed(x, weight, None, self.stride, self.padding, self.left, self.groups, self.dilation)
