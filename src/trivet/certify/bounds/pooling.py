"""Max-pooling: the largest value of each window, and two lines between which it lies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trivet.certify.bounds.interval import Interval
from trivet.certify.bounds.layer import Layer, Pulled, inner
from trivet.certify.bounds.rounding import Rounding


@dataclass(frozen=True, eq=False)
class MaxPool(Layer):
    """Maps [B, C, H, W] to the maxima of windows, n of them for each channel; what `padding` adds never wins.

    Over intervals [l_i, u_i] of a window, with k the place of the largest lower end:

        below   y >= x_k
        above   y <= x_k                          if l_k >= u_j for every other j, else the lower in the middle of
                y <= max_j u_j                    and
                y <= g + sum_I w_i (x_i - l_i)    I = { i: u_i > max l },  w_i = (u_i - g) / (u_i - l_i)

    The last is CNN-Cert's (Boopathy et al., AAAI 2019). It holds for every g in [max_i l_i, min_I u_i], in particular
    for theirs: g = (sum_I u_i / (u_i - l_i) - 1) / (sum_I 1 / (u_i - l_i)), clipped to that interval. For a maximum
    below g both sides are clear; above g it is some x_i, and x_i <= g + w_i (x_i - l_i), as this line meets x_i at
    u_i and lies above it below.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    ceil: bool = False

    def __call__(self, *inputs: Tensor) -> Tensor:
        return F.max_pool2d(inputs[0], self.kernel, self.stride, self.padding, self.dilation, self.ceil)

    def bounds(self, inputs: Sequence[Interval], rounding: Rounding | None) -> Interval:
        return Interval(self(inputs[0].lower), self(inputs[0].upper))

    def pull(
        self,
        rows: Tensor,
        inputs: Sequence[Interval],
        output: Interval,
        slope: str | Tensor,
        rounding: Rounding | None,
        steps: int,
    ) -> Pulled:
        lower, upper = inputs[0].lower, inputs[0].upper
        size = tuple(lower.shape[2:])
        low, high = self._windows(lower), self._windows(upper)
        chosen = F.one_hot(low.argmax(2), low.shape[2]).movedim(-1, 2).to(rows.dtype)  # [B, C, k, n]
        weights, offset = _above(low, high, chosen)
        # [B, S, C, 1, n], and what concerns intervals without S
        flat = rows.flatten(3).unsqueeze(3)
        ours = flat.clamp(min=0.0) * chosen.unsqueeze(1) + flat.clamp(max=0.0) * weights.unsqueeze(1)
        new = self._scattered(ours.flatten(0, 1), size).unflatten(0, rows.shape[:2])
        constant = (flat.clamp(max=0.0).squeeze(3) * offset.unsqueeze(1)).sum((2, 3))
        if rounding is not None:
            count = rows[0, 0].numel() + low.shape[2] + 4 * steps
            error = rounding.backward(0, count)
            # Weights and offset are sums over a window of terms of this size.
            slack = error * 8 * low.shape[2] * torch.maximum(low.abs(), high.abs()).nan_to_num(0.0, 0.0, 0.0).sum(2)
            constant = constant - inner(rows.abs(), slack.view(output.shape) + rounding.least(count))
        return Pulled((new,), constant)

    def _windows(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to windows [B, C, k, n]; places outside hold -infinity."""
        index = self._places(x)
        values = F.pad(x.flatten(2), (0, 1), value=-math.inf)
        return values[:, :, index]

    def _scattered(self, ours: Tensor, size: tuple[int, ...]) -> Tensor:
        """The sum over windows [R, C, k, n] at each pixel, [R, C, H, W]."""
        pixels = math.prod(size)
        index = self._places(ours.new_empty(1, 1, *size)).flatten()
        total = ours.new_zeros(*ours.shape[:2], pixels + 1).index_add(2, index, ours.flatten(2))
        return total[:, :, :pixels].unflatten(2, size)

    def _places(self, x: Tensor) -> Tensor:
        """For each place of each window its pixel, [k, n]; outside is one past the last."""
        height, width = x.shape[2:]
        numbers = torch.arange(height * width, device=x.device, dtype=torch.float64).view(1, 1, height, width)
        rows, columns = self(x.new_zeros(1, 1, height, width)).shape[2:]
        need = [
            (out - 1) * stride + (kernel - 1) * dilation + 1 - side - pad
            for out, stride, kernel, dilation, side, pad in zip(
                (rows, columns), self.stride, self.kernel, self.dilation, (height, width), self.padding, strict=True
            )
        ]
        padded = F.pad(
            numbers,
            (self.padding[1], max(need[1], 0), self.padding[0], max(need[0], 0)),
            value=float(height * width),
        )
        found = F.unfold(padded, self.kernel, self.dilation, 0, self.stride)
        columns_found = (padded.shape[3] - (self.kernel[1] - 1) * self.dilation[1] - 1) // self.stride[1] + 1
        return found.view(-1, found.shape[2] // columns_found, columns_found)[:, :rows, :columns].flatten(1).long()


def _above(low: Tensor, high: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [B, C, k, n] and offset [B, C, n] of a line above the maxima of windows."""
    floor, ceiling = low.amax(2, keepdim=True), high.amax(2, keepdim=True)
    inside = high > floor  # the others never are the maximum alone
    width = (high - low).where(inside & (low > -math.inf), torch.ones_like(low))
    steep = (1 / width).where(inside, 0.0)
    least = high.where(inside, math.inf).amin(2, keepdim=True)
    g = ((high * steep).where(inside, 0.0).sum(2, keepdim=True) - 1) / steep.sum(2, keepdim=True)
    g = torch.minimum(torch.maximum(g, floor), least)
    weights = ((high - g) * steep).where(inside, 0.0)
    offset = g - (weights * low).where(inside, 0.0).sum(2, keepdim=True)
    middle = ((low + high) / 2).where(inside, 0.0)
    # NaN, where a width is 0 or infinite, is no better than the constant.
    better = offset + (weights * middle).sum(2, keepdim=True) < ceiling
    weights, offset = weights.where(better, 0.0), offset.where(better, ceiling)
    others = high.masked_fill(chosen.bool(), -math.inf).amax(2, keepdim=True)
    sole = others <= floor
    return chosen.where(sole, weights), offset.masked_fill(sole, 0.0).squeeze(2)
