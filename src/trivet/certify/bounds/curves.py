"""Smooth functions of single values: those with one minimum (GELU, SiLU), and convex ones (softplus, ELU, CELU)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trivet.certify.bounds.activations import ULPS, Activation, Lines
from trivet.certify.bounds.interval import Interval
from trivet.certify.bounds.rounding import Rounding

CELLS = 64
"""Into which the middle of an interval is cut to find how far up a line may lie."""


class _Curved(Activation):
    """What all functions of this file share: their errors, and what their lines add to those of monotone ones."""

    def _slack(self, before: Interval, output: Interval, rounding: Rounding, count: int) -> Tensor:
        # Offsets are sums of values and of products with slopes up to 1.2, of which several make up a line.
        more = rounding.backward(0, count) * 4 * (before.size + 1)
        return super()._slack(before, output, rounding, count) + more

    def _error(self, before: Interval, output: Interval, rounding: Rounding) -> Tensor:
        # t times a share of 1 that is itself a difference: relative to t, not to the product.
        unit = ULPS * 2 * (rounding.network + rounding.ours)
        return unit * (before.size + output.size + 1) + rounding.least(ULPS)


@dataclass(frozen=True, eq=False)
class Valley(_Curved):
    """A function that falls to its one minimum, rises from there, and nears 0 on the left and t on the right.

    On an interval it is largest at an end, and smallest at an end or at the minimum. A line of any slope a may be laid
    below: its offset is the smallest f(t) - a t, which is found on a grid. Between two of its points, h apart, f is off
    their chord by at most `curvature` h^2 / 8; outside of [-reach, reach], where f is off max(t, 0) by at most `rest`,
    by 2 `rest`. Likewise above. Of the slopes 0, that of the chord and that in the middle, the line is taken that is
    the closest to f in the middle of the interval.

    Attributes:
        lowest: an interval around the place of the minimum.
        minimum: not above it.
        curvature: at least |f''| everywhere.
    """

    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    lowest: tuple[float, float]
    minimum: float
    curvature: float
    reach: float
    rest: float

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.function(inputs[0])

    def bounds(self, inputs: Sequence[Interval], rounding: Rounding | None) -> Interval:
        before = inputs[0]
        low, high = self.function(before.lower), self.function(before.upper)
        inside = (before.lower <= self.lowest[1]) & (before.upper >= self.lowest[0])
        least = torch.minimum(low, high).masked_fill(inside, self.minimum)
        output = Interval(least, torch.maximum(low, high))
        if rounding is None:
            return output
        error = self._error(before, output, rounding)
        return Interval(output.lower - error, output.upper + error).checked(rounding)

    def lines(self, lower: Tensor, upper: Tensor, slope: str | Tensor) -> Lines:
        middle, width = (lower + upper) / 2, upper - lower
        chord = (self.function(upper) - self.function(lower)) / width.clamp(min=torch.finfo(lower.dtype).tiny)
        slopes = [chord.clamp(-0.2, 1.2), self.derivative(middle).clamp(-0.2, 1.2), torch.zeros_like(chord)]
        # True whatever they are: gradients of a training need not go through the choice.
        slopes = [each.detach() for each in slopes]
        first, last = lower.clamp(-self.reach, self.reach), upper.clamp(-self.reach, self.reach)
        cell = (last - first) / CELLS
        places = [lower, *(first + step * cell for step in range(CELLS + 1)), upper]
        below = [torch.full_like(lower, math.inf) for _ in slopes]
        above = [torch.full_like(lower, -math.inf) for _ in slopes]
        for place in places:
            value = self.function(place)
            for k, each in enumerate(slopes):
                rest = value - each * place
                below[k], above[k] = torch.minimum(below[k], rest), torch.maximum(above[k], rest)
        slack = (self.curvature / 8 * cell.square() * (1 + 1e-6)).clamp(min=2 * self.rest)
        lower_slope, lower_offset = _best(slopes, [each - slack for each in below], middle)
        upper_slope, negated = _best([-each for each in slopes], [-slack - each for each in above], middle)
        return Lines(lower_slope, lower_offset, -upper_slope, -negated)


def _best(slopes: Sequence[Tensor], offsets: Sequence[Tensor], middle: Tensor) -> tuple[Tensor, Tensor]:
    """The line that is the highest in the middle."""
    slope, offset = slopes[0], offsets[0]
    for other, beside in zip(slopes[1:], offsets[1:], strict=True):
        better = other * middle + beside > slope * middle + offset
        slope, offset = other.where(better, slope), beside.where(better, offset)
    return slope, offset


@dataclass(frozen=True, eq=False)
class Convex(_Curved):
    """A convex, non-decreasing function with a slope of at most 1: below its chord, above its tangent in the middle.

    Attributes:
        function: as the bounds know it.
        evaluated: as the network computes it: at most `drop` below it, and never above.
    """

    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    evaluated: Callable[[Tensor], Tensor]
    drop: float = 0.0

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.evaluated(inputs[0])

    def bounds(self, inputs: Sequence[Interval], rounding: Rounding | None) -> Interval:
        before = inputs[0]
        output = Interval(self.function(before.lower) - self.drop, self.function(before.upper))
        if rounding is None:
            return output
        error = self._error(before, output, rounding)
        return Interval(output.lower - error, output.upper + error).checked(rounding)

    def lines(self, lower: Tensor, upper: Tensor, slope: str | Tensor) -> Lines:
        low, high, middle, width = self.function(lower), self.function(upper), (lower + upper) / 2, upper - lower
        # Between close ends the errors of two values would make any chord: there a flat line is as good.
        wide = width > 1e-6
        chord = ((high - low) / width.where(wide, torch.ones_like(width))).clamp(0.0, 1.0) * wide
        offset = torch.maximum(low - chord * lower, high - chord * upper)
        tangent = self.derivative(middle)
        # A slope that is off by some units turns around the middle, and goes down by this at the ends.
        turned = 4 * ULPS * torch.finfo(lower.dtype).eps * width
        return Lines(tangent, self.function(middle) - tangent * middle - turned - self.drop, chord, offset)


def gelu(approximate: str = "none") -> Valley:
    """t Phi(t), or its approximation by tanh (Hendrycks & Gimpel 2016)."""
    if approximate == "none":
        return Valley(
            F.gelu,
            lambda t: torch.special.ndtr(t) + t * (-t * t / 2).exp() / math.sqrt(2 * math.pi),
            (-0.7517917, -0.7517915),
            -0.16997120748,
            0.7979,  # 2 phi(0) = 0.79788
            9.0,
            1e-17,
        )
    return Valley(
        lambda t: F.gelu(t, approximate="tanh"),
        _tanh_gelu_slope,
        (-0.752462, -0.752460),
        -0.17004075058,
        0.7979,
        9.0,
        1e-17,
    )


def _tanh_gelu_slope(t: Tensor) -> Tensor:
    root = math.sqrt(2 / math.pi)
    share = torch.tanh(root * (t + 0.044715 * t**3))
    return (1 + share) / 2 + t / 2 * (1 - share.square()) * root * (1 + 3 * 0.044715 * t.square())


def silu() -> Valley:
    """t sigmoid(t), also called swish; f''(0) = 1/2 is its largest curvature."""

    def derivative(t: Tensor) -> Tensor:
        share = torch.sigmoid(t)
        return share * (1 + t * (1 - share))

    return Valley(F.silu, derivative, (-1.2784646, -1.2784645), -0.27846454277, 0.5001, 20.0, 4.2e-8)


def softplus(beta: float = 1.0, threshold: float = 20.0) -> Convex:
    """log(1 + exp(beta t)) / beta; PyTorch takes t instead where beta t > threshold, which is a little less."""
    return Convex(
        lambda t: torch.logaddexp(torch.zeros_like(t), beta * t) / beta,
        lambda t: torch.sigmoid(beta * t),
        lambda t: F.softplus(t, beta, threshold),
        1.001 * math.log1p(math.exp(-threshold)) / beta,
    )


def elu(alpha: float = 1.0) -> Convex:
    """t above 0, alpha (exp(t) - 1) below; convex for alpha in [0, 1]."""

    def function(t: Tensor) -> Tensor:
        return F.elu(t, alpha)

    return Convex(function, lambda t: torch.where(t > 0, 1.0, alpha * t.clamp(max=0.0).exp()).to(t.dtype), function)


def celu(alpha: float = 1.0) -> Convex:
    """t above 0, alpha (exp(t / alpha) - 1) below."""

    def function(t: Tensor) -> Tensor:
        return F.celu(t, alpha)

    return Convex(function, lambda t: (t / alpha).clamp(max=0.0).exp(), function)
