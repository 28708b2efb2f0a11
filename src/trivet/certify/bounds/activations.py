"""Elementwise monotone functions: what they do to intervals, and the two lines between which they lie."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trivet.certify.bounds.interval import Interval
from trivet.certify.bounds.layer import Layer, Pulled, inner
from trivet.certify.bounds.rounding import Rounding
from trivet.errors import BadValue, require

ULPS = 16
"""Units in the last place by which library functions such as exp and tanh may be off."""


@dataclass(frozen=True, eq=False)
class Lines:
    """lower_slope t + lower_offset <= f(t) <= upper_slope t + upper_offset for every t of an interval.

    The lower line's may be [B, S, ...], one for each row of the specification; the others are [B, 1, ...]. No
    lower offset is 0.
    """

    lower_slope: Tensor
    lower_offset: Tensor | None
    upper_slope: Tensor
    upper_offset: Tensor


@dataclass(frozen=True, eq=False)
class Relaxed:
    """<rows, f(t)> >= <low rows + gap below, t> + <rows, first> + <below, second>, with below = min(rows, 0).

    Shapes are those of `Lines`, whose offsets are here, with errors; no `first` is 0.
    """

    low: Tensor
    gap: Tensor
    first: Tensor | None
    second: Tensor


@dataclass(frozen=True, eq=False)
class Activation(Layer):
    """A non-decreasing function of single values, with a slope of at most 1 everywhere."""

    computed = True
    """Whether values are computed with rounding, rather than picked."""

    @abstractmethod
    def lines(self, lower: Tensor, upper: Tensor, slope: str | Tensor) -> Lines:
        """The lines over [lower, upper], both [B, 1, ...]; exact up to the rounding of a few operations."""

    def bounds(self, inputs: Sequence[Interval], rounding: Rounding | None) -> Interval:
        lower, upper = self(inputs[0].lower), self(inputs[0].upper)
        if rounding is None or not self.computed:
            return Interval(lower, upper)
        error = self._error(inputs[0], Interval(lower, upper), rounding)
        return Interval(lower - error, upper + error)

    def pull(
        self,
        rows: Tensor,
        inputs: Sequence[Interval],
        output: Interval,
        slope: str | Tensor,
        rounding: Rounding | None,
        steps: int,
    ) -> Pulled:
        relaxed = self.relaxed(inputs[0], output, slope, rounding, rows[0, 0].numel() + 4 * steps)
        if relaxed.first is None:
            new, constant, _ = _Crossing.apply(rows, relaxed.low, relaxed.gap, relaxed.second)
        else:
            below = rows.clamp(max=0.0)
            new = torch.addcmul(rows * relaxed.low, below, relaxed.gap)
            constant = _inner(rows, relaxed.first) + _inner(below, relaxed.second)
        return Pulled((new,), constant)

    def relaxed(
        self, before: Interval, output: Interval, slope: str | Tensor, rounding: Rounding | None, count: int
    ) -> Relaxed:
        """What a backward pass needs, which adds up `count` numbers: of all rows the same."""
        lines = self.lines(before.lower.unsqueeze(1), before.upper.unsqueeze(1), slope)
        low, first, second = lines.lower_slope, lines.lower_offset, lines.upper_offset
        # Positive entries meet the lower line, negative ones the upper one.
        second = second if first is None else second - first
        if rounding is not None:
            # |rows| = rows - 2 below
            slack = self._slack(before, output, rounding, count).unsqueeze(1)
            first = -slack if first is None else first - slack
            second = second + 2 * slack
        return Relaxed(low, lines.upper_slope - low, first, second)

    def _slack(self, before: Interval, output: Interval, rounding: Rounding, count: int) -> Tensor:
        slack = rounding.backward(0, count) * (before.size + output.size) + rounding.least(count)
        return slack + self._error(before, output, rounding) if self.computed else slack

    def _error(self, before: Interval, output: Interval, rounding: Rounding) -> Tensor:
        unit = ULPS * 2 * (rounding.network + rounding.ours)
        return unit * (output.size + self.absolute) + rounding.least(ULPS)

    @property
    def absolute(self) -> float:
        """A value to whose size errors are relative, besides the function's own."""
        return 0.0


class _Crossing(torch.autograd.Function):
    """Rows [B, S, ...] through lines of which the lower one meets 0: a r, for r < 0 with g r more, and sum d0 r there.

    What autograd would do by itself, in fewer passes over the largest tensors of a backward bound.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, low: Tensor, gap: Tensor, offset: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        below = rows.clamp(max=0.0)
        return torch.addcmul(rows * low, below, gap), _inner(below, offset), below

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        below = output[2]
        ctx.mark_non_differentiable(below)
        ctx.save_for_backward(*inputs, below)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, low, gap, offset, below = ctx.saved_tensors
        by_rows, by_constant, _ = gradients
        by_constant = by_constant.view(*by_constant.shape, *[1] * (rows.ndim - 2))
        by_low = by_gap = by_offset = None
        if ctx.needs_input_grad[1]:
            by_low = (by_rows * rows).sum_to_size(low.shape)
        if ctx.needs_input_grad[2]:
            by_gap = (by_rows * below).sum_to_size(gap.shape)
        if ctx.needs_input_grad[3]:
            by_offset = (below * by_constant).sum_to_size(offset.shape)
        # Of negative entries gap g + offset c more than of positive ones: this, where it is not taken back.
        more = torch.addcmul(by_rows * gap, offset, by_constant)
        back = torch.ops.aten.threshold_backward(more, rows, 0)
        return more.sub(back).addcmul(by_rows, low), by_low, by_gap, by_offset


def _inner(rows: Tensor, values: Tensor) -> Tensor:
    return inner(rows, values.squeeze(1) if values.shape[1] == 1 else values)


@dataclass(frozen=True, eq=False)
class Rectifier(Activation):
    """max(t, leak t): ReLU for a leak of 0, leaky ReLU up to a leak of 1.

    Unstable (lower < 0 < upper), it lies below its chord, and above every line through 0 with a slope between `leak`
    and 1.
    """

    leak: float = 0.0

    def __post_init__(self) -> None:
        require(0 <= self.leak <= 1, f"leak={self.leak} must lie in [0, 1]: others have no bounds here.")

    @property
    def computed(self) -> bool:  # type: ignore[override]
        return self.leak > 0

    def __call__(self, *inputs: Tensor) -> Tensor:
        return inputs[0].relu() if self.leak == 0 else torch.maximum(inputs[0], self.leak * inputs[0])

    def bounds(self, inputs: Sequence[Interval], rounding: Rounding | None) -> Interval:
        if rounding is None and self.leak == 0:
            middle, radius, _ = _RectifiedBall.apply(inputs[0].middle, inputs[0].radius)
            return Interval.around(middle, radius)
        return super().bounds(inputs, rounding)

    def _slack(self, before: Interval, output: Interval, rounding: Rounding, count: int) -> Tensor:
        slack = super()._slack(before, output, rounding, count)
        # What is off is 0 in every arithmetic.
        return slack if self.leak else slack.where(before.upper > 0, 0.0)

    def lines(self, lower: Tensor, upper: Tensor, slope: str | Tensor) -> Lines:
        tiny = torch.finfo(lower.dtype).tiny
        below, above = lower.clamp(max=0.0), upper.clamp(min=0.0)
        # Where below = above = 0 any slope will do, because the interval is the single point 0.
        share = above / (above - below).clamp(min=tiny)
        chord = self.leak + (1 - self.leak) * share
        chord = chord.where(lower < 0, torch.ones_like(chord)).where(upper > 0, self.leak)
        # Of a chord with a rounded slope the offset that both ends need, and a little more.
        offset = torch.maximum((self.leak - chord) * below, (1 - chord) * above)
        offset = offset * (1 + 16 * torch.finfo(lower.dtype).eps)
        unstable = (lower < 0) & (upper > 0)
        offset = offset.where(unstable, torch.zeros_like(offset))
        # Chords of stable neurons are constants, and so are named slopes: only `same` moves with the interval.
        fixed = chord if slope == "same" else chord.detach()
        return Lines(self.tangent(slope, share.detach(), fixed).where(unstable, fixed), None, chord, offset)

    def tangent(self, slope: str | Tensor, share: Tensor, chord: Tensor) -> Tensor:
        if isinstance(slope, Tensor):  # in [0, 1], of the way from the leak to 1
            return self.leak + (1 - self.leak) * slope
        if slope == "same":
            return chord
        if slope == "adaptive":
            return self.leak + (1 - self.leak) * (share > 0.5).to(share.dtype)
        if slope in ("zero", "one"):
            return torch.full_like(share, self.leak if slope == "zero" else 1.0)
        raise BadValue(f"slope={slope!r} must be 'adaptive', 'zero', 'one' or 'same'.")


class _RectifiedBall(torch.autograd.Function):
    """Middle and radius of the rectified interval, from middle and radius: a third of the passes over memory."""

    generate_vmap_rule = True

    @staticmethod
    def forward(middle: Tensor, radius: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        lower = torch.sub(middle, radius).relu_()
        upper = torch.add(middle, radius).relu_()
        centre = torch.lerp(lower, upper, 0.5)
        return centre, upper.sub_(centre), lower

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ARG004
        centre, _, lower = output
        ctx.mark_non_differentiable(lower)
        ctx.save_for_backward(centre, lower)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        centre, lower = ctx.saved_tensors
        by_centre, by_radius, _ = gradients
        # Of the ends: d centre = (d lower + d upper) / 2 where they are positive, d radius = (d upper - d lower) / 2.
        by_lower = torch.ops.aten.threshold_backward(by_centre - by_radius, lower, 0)
        by_upper = torch.ops.aten.threshold_backward(by_centre + by_radius, centre, 0)
        by_middle = torch.lerp(by_lower, by_upper, 0.5)
        return by_middle, by_upper - by_middle


@dataclass(frozen=True, eq=False)
class Sigmoidal(Activation):
    """sigmoid or tanh: convex below 0 and concave above; lines as DeepPoly's (Singh et al., POPL 2019).

    The slope f' falls towards both ends, so that a line through an end with the smaller of f'(lower) and f'(upper)
    stays on one side; where f is convex or concave on the whole interval, one line is the chord.
    """

    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    """f' as a function of f(t)."""

    @property
    def absolute(self) -> float:
        return 1.0

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.function(inputs[0])

    def lines(self, lower: Tensor, upper: Tensor, slope: str | Tensor) -> Lines:
        low, high = self.function(lower), self.function(upper)
        width = upper - lower
        # A function's error, divided by a width near 0, would make any chord: the flat lines below are true there.
        wide = width > 1e-6
        least = torch.minimum(self.derivative(low), self.derivative(high)).clamp(min=0.0)
        # f' is at its smallest at an end, up to the errors of computing it.
        least = (least * (1 - 1e-12) - 1e-15 if lower.dtype == torch.float64 else least).clamp(min=0.0)
        chord = ((high - low) / width.where(wide, torch.ones_like(width))).clamp(0.0, 1.0)
        lower_slope = chord.where(wide & (lower >= 0), least)
        upper_slope = chord.where(wide & (upper <= 0), least)
        # Through the ends, as far down or up as both of them need.
        lower_offset = torch.minimum(low - lower_slope * lower, high - lower_slope * upper)
        upper_offset = torch.maximum(low - upper_slope * lower, high - upper_slope * upper)
        return Lines(lower_slope, lower_offset, upper_slope, upper_offset)


@dataclass(frozen=True, eq=False)
class Monotone(Activation):
    """Any other non-decreasing function, relaxed by its two end values: true, and far from tight."""

    function: Callable[[Tensor], Tensor]

    @property
    def absolute(self) -> float:
        return 1.0

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.function(inputs[0])

    def lines(self, lower: Tensor, upper: Tensor, slope: str | Tensor) -> Lines:
        flat = torch.zeros_like(lower)
        return Lines(flat, self.function(lower), flat, self.function(upper))


def sigmoid() -> Sigmoidal:
    return Sigmoidal(torch.sigmoid, lambda y: y * (1 - y))


def tanh() -> Sigmoidal:
    return Sigmoidal(torch.tanh, lambda y: (1 - y) * (1 + y))
