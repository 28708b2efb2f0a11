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
        variance: the ends of mean(c^2) + eps, exact.
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
    variance: tuple[Tensor, Tensor]
    eps: float


@dataclass(frozen=True, eq=False)
class Standardise(Layer):
    """Groups [B, N, n] to c / sqrt(mean(c^2) + eps), with c = x - mean(x), or c = x without `centred`; means over n.

    Interval: with R = sum_{j != i} c_j^2 the value c_i / sqrt((c_i^2 + R) / n + eps) grows with c_i, and its size falls
    with R. Its range over a box of c is therefore attained at the ends, and where c sums up to 0, R >= c_i^2 / (n - 1).

    Lines, of y = c r with r = (mean(c^2) + eps)^-1/2 in [r_0, r_1] and c in [l, u], whichever is closest in the middle:
    above, the convex max(c r_0, c r_1), hence its chord, or McCormick's u r + r_0 c - u r_0 and l r + r_1 c - l r_1;
    below, the chord of min(c r_0, c r_1), or l r + r_0 c - l r_0 and u r + r_1 c - u r_1; or an end of the interval.
    There r, convex and falling in the variance, lies between a tangent and its chord, and the squares in the variance
    between theirs: two linear functions of the group, R_0 <= r <= R_1.

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
        between = _inverse_deviation(parts)
        below = self._line(parts, between, output.lower, sign=1)
        above = self._line(parts, between, output.upper, sign=-1)
        falling = rows.clamp(max=0.0)
        rising = rows - falling
        # Whatever r is multiplied by, it is R_0 that is below where that is positive, and R_1 where it is negative.
        shares = rising * below[1].unsqueeze(1) + falling * above[1].unsqueeze(1)
        weights = [each.sum(-1, keepdim=True) for each in (shares.clamp(min=0.0), shares.clamp(max=0.0))]
        pulled = rising * below[0].unsqueeze(1) + falling * above[0].unsqueeze(1)
        constant = inner(rising, below[2]) + inner(falling, above[2])
        for weight, (coefficients, offset) in zip(weights, between, strict=True):
            pulled = pulled + weight * coefficients.unsqueeze(1)
            constant = constant + inner(weight, offset)
        if self.centred:
            pulled = pulled - pulled.mean(-1, keepdim=True)
        if rounding is not None:
            count = rows[0, 0].numel() + 4 * inputs[0].shape[-1] + 4 * steps
            largest = parts.most.amax(-1, keepdim=True).sqrt() + inputs[0].size.amax(-1, keepdim=True)
            terms = sum(each.abs().sum(-1, keepdim=True) * largest + offset.abs() for each, offset in between)
            # The tangent's offset is a difference of terms of the size of squares.
            terms = terms + ((parts.variance[0] + parts.variance[1]) / 2).rsqrt().pow(3) * largest.square()
            slack = rounding.backward(0, count) * (16 * largest * (parts.fastest * 2 + 2 * terms) + 2 * output.size)
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
        return _Parts(low, high, least, most, slowest, fastest, off, moved * fastest, (smallest, largest), self.eps)

    def _line(
        self, parts: _Parts, between: Sequence[tuple[Tensor, Tensor]], flat: Tensor, *, sign: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A line a c_i + b r + d, as (a, b, d): below y with `sign` 1, above with -1, the closest in the middle."""
        low, high, slow, fast = parts.low, parts.high, parts.slowest, parts.fastest
        bend = torch.minimum if sign > 0 else torch.maximum
        ends = [bend(c * slow, c * fast) for c in (low, high)]
        slope = (ends[1] - ends[0]) / (high - low).clamp(min=torch.finfo(low.dtype).tiny)
        # Any slope will do with the offset that both ends need; these are the ones that it can have.
        slope = torch.minimum(torch.maximum(slope, slow), fast)
        offset = bend(ends[0] - slope * low, ends[1] - slope * high)
        zero = torch.zeros_like(low)
        lines = [(zero, zero, flat), (slope, zero, offset)]
        # By r as computed: what it may be off counts with the largest c.
        loose = sign * torch.maximum(low.abs(), high.abs()) * fast * (parts.off[1] - parts.off[0])
        for b, a in ((low, slow), (high, fast)) if sign > 0 else ((high, slow), (low, fast)):
            lines.append((a.expand_as(b), b, -a * b - loose))
        middle = (low + high) / 2
        at = [(coefficients * middle).sum(-1, keepdim=True) + offset for coefficients, offset in between]
        best, value = lines[0], flat
        for a, b, d in lines[1:]:
            here = a * middle + b * torch.where(sign * b >= 0, at[0], at[1]) + d
            closer = sign * (here - value) > 0
            best = (a.where(closer, best[0]), b.where(closer, best[1]), d.where(closer, best[2]))
            value = here.where(closer, value)
        return best


def _inverse_deviation(parts: _Parts) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """R_0 and R_1, as coefficients [B, N, n] of c and offsets [B, N, 1]."""
    low, high, n = parts.low, parts.high, parts.low.shape[-1]
    middle = (low + high) / 2
    smallest, largest = parts.variance
    centre = (smallest + largest) / 2
    # The tangent of v^-1/2 falls, so it takes the chord of each square, which lies above.
    height, fall = centre.rsqrt(), centre.rsqrt().pow(3) / 2
    eps = parts.eps
    tangent = (
        -fall * (low + high) / n,
        height + fall * (centre - eps + (low * high).mean(-1, keepdim=True)),
    )
    # The chord falls, too, and takes the tangent of each square.
    top, bottom = smallest.rsqrt(), largest.rsqrt()
    steep = (top - bottom) / (largest - smallest).clamp(min=torch.finfo(low.dtype).tiny)
    steep = torch.minimum(steep, smallest.rsqrt().pow(3) / 2)
    chord = (
        -2 * steep * middle / n,
        torch.maximum(top + steep * smallest, bottom + steep * largest)
        + steep * (middle.square().mean(-1, keepdim=True) - eps),
    )
    return tangent, chord
