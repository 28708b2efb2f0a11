"""Values brought to mean 0 and variance 1 within groups of a record: LayerNorm, GroupNorm, InstanceNorm, RMSNorm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trivet.certify.bounds.activations import ULPS
from trivet.certify.bounds.interval import Interval
from trivet.certify.bounds.layer import Layer, Pulled, inner
from trivet.certify.bounds.rounding import Rounding


class _Parts(NamedTuple):
    """What is known of a group: its centred values c, the inverse standard deviation r, and errors.

    Attributes:
        low, high: of c, exact and as a network computes it.
        least, most: the squares of c are at least and at most this.
        slowest, fastest: of r as computed, [B, N, 1].
        off: how far r as computed may lie from r, as a factor: (least, largest).
        moved: at least the error of computed values, [B, N, 1].
    """

    low: Tensor
    high: Tensor
    least: Tensor
    most: Tensor
    slowest: Tensor
    fastest: Tensor
    off: tuple[Tensor, Tensor]
    moved: Tensor


@dataclass(frozen=True, eq=False)
class Standardise(Layer):
    """Groups [B, N, n] to c / sqrt(mean(c^2) + eps), with c = x - mean(x), or c = x without `centred`; means over n.

    Interval: with R = sum_{j != i} c_j^2 the value c_i / sqrt((c_i^2 + R) / n + eps) grows with c_i, and its size falls
    with R. Its range over a box of c is therefore attained at the ends, and where c sums up to 0, R >= c_i^2 / (n - 1).

    Lines: of y = c r with r = (mean(c^2) + eps)^-1/2 in [r_0, r_1], over the intervals of c, y lies below the convex
    max(c r_0, c r_1), hence below its chord, and above the chord of min(c r_0, c r_1); or within the interval above,
    where that is closer in the middle.

    Errors allow for a variance as the difference of two means, relative to the squares of the inputs. Where this
    exceeds the least variance plus eps nothing is known, as may be for large values that hardly differ.
    """

    eps: float
    centred: bool = True

    def __call__(self, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        if self.centred:
            return F.layer_norm(x, x.shape[-1:], eps=self.eps)
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()

    def bounds(self, inputs: Sequence[Interval], rounding: Rounding | None) -> Interval:
        parts = self._parts(inputs[0], rounding)
        n = inputs[0].shape[-1]
        # The others' squares: what is left of the sum, which rounding may move by a share of the sum.
        slack = 4 * n * torch.finfo(parts.low.dtype).eps
        rest_least, rest_most = (
            (total - each + sign * slack * total).clamp(min=0.0)
            for each, total, sign in (
                (parts.least, parts.least.sum(-1, keepdim=True), -1),
                (parts.most, parts.most.sum(-1, keepdim=True), 1),
            )
        )

        def at(c: Tensor, outwards: Tensor) -> Tensor:
            """The value at an end c: far from 0 if `outwards`, near it elsewhere."""
            square = c.square()
            far = torch.maximum(rest_least, square / (n - 1)) if self.centred else rest_least
            value = c * ((square + far.where(outwards, rest_most)) / n + self.eps).rsqrt()
            ends = value * parts.off[0], value * parts.off[1]
            return torch.where(outwards, ends[1], ends[0])

        lower, upper = at(parts.low, parts.low < 0), at(parts.high, parts.high > 0)
        output = Interval(lower, upper)
        if rounding is None:
            return output
        error = parts.moved + self._unit(rounding) * output.size + rounding.least(ULPS)
        return Interval(lower - error, upper + error).checked(rounding)

    def pull(
        self,
        rows: Tensor,
        inputs: Sequence[Interval],
        output: Interval,
        slope: str | Tensor,
        rounding: Rounding | None,
        steps: int,
    ) -> Pulled:
        parts = self._parts(inputs[0], rounding)
        ends = (parts.low, parts.high)
        under = [torch.minimum(c * parts.slowest, c * parts.fastest) for c in ends]
        over = [torch.maximum(c * parts.slowest, c * parts.fastest) for c in ends]
        below = self._line(parts, under, output.lower, above=False)
        above = self._line(parts, over, output.upper, above=True)
        falling = rows.clamp(max=0.0)
        rising = rows - falling
        pulled = rising * below[0].unsqueeze(1) + falling * above[0].unsqueeze(1)
        constant = inner(rising, below[1]) + inner(falling, above[1])
        if self.centred:
            pulled = pulled - pulled.mean(-1, keepdim=True)
        if rounding is not None:
            count = rows[0, 0].numel() + 4 * inputs[0].shape[-1] + 4 * steps
            size = inputs[0].size.amax(-1, keepdim=True)
            slack = rounding.backward(0, count) * (16 * parts.fastest * size + 2 * output.size)
            slack = slack + parts.moved + self._unit(rounding) * output.size + rounding.least(count)
            constant = constant - inner(rows.abs(), slack)
        return Pulled((pulled,), constant)

    def _unit(self, rounding: Rounding) -> float:
        return ULPS * 2 * (rounding.network + rounding.ours)

    def _parts(self, before: Interval, rounding: Rounding | None) -> _Parts:
        n = before.shape[-1]
        low, high = before.lower, before.upper
        if self.centred:
            # c_i = (1 - 1 / n) x_i - 1 / n of the sum of the others
            low, high = (
                mine - (mine + (total - its)) / n
                for mine, its, total in (
                    (low, high, high.sum(-1, keepdim=True)),
                    (high, low, low.sum(-1, keepdim=True)),
                )
            )
        size = before.size.amax(-1, keepdim=True)
        moved = torch.zeros_like(size)
        if rounding is not None:
            moved = rounding.forward(n + 8) * 6 * size
            low, high = low - moved, high + moved
        least = torch.maximum(low, -high).clamp(min=0.0).square()
        most = torch.maximum(low.square(), high.square())
        smallest, largest = least.mean(-1, keepdim=True) + self.eps, most.mean(-1, keepdim=True) + self.eps
        one = torch.ones_like(size)
        off = (one, one)
        if rounding is not None:
            share = rounding.forward(n + 8) * 8 * (size.square() + self.eps) / smallest
            unknown = share >= 1  # the root of what follows is no number, and the bounds are none
            off = ((1 + share).rsqrt(), (1 - share).masked_fill(unknown, torch.nan).rsqrt())
        slowest, fastest = largest.rsqrt() * off[0], smallest.rsqrt() * off[1]
        return _Parts(low, high, least, most, slowest, fastest, off, moved * fastest)

    def _line(self, parts: _Parts, ends: Sequence[Tensor], flat: Tensor, *, above: bool) -> tuple[Tensor, Tensor]:
        """Slope and offset of a line through both `ends`, or the constant `flat`, whichever is closer in the middle."""
        width = parts.high - parts.low
        slope = (ends[1] - ends[0]) / width.clamp(min=torch.finfo(width.dtype).tiny)
        # Any slope will do with the offset that both ends need; these are the ones that it can have.
        slope = torch.minimum(torch.maximum(slope, parts.slowest), parts.fastest)
        offsets = [end - slope * c for end, c in zip(ends, (parts.low, parts.high), strict=True)]
        offset = torch.maximum(*offsets) if above else torch.minimum(*offsets)
        middle = slope * (parts.low + parts.high) / 2 + offset
        better = middle < flat if above else middle > flat
        return slope.where(better, 0.0), offset.where(better, flat)
