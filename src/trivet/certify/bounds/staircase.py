"""Rounding to a grid, as quantised activations are: functions of single values that rise in steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trivet.certify.bounds.interval import Interval
from trivet.certify.bounds.layer import Layer, Pulled, inner
from trivet.certify.bounds.moving import Scale
from trivet.certify.bounds.rounding import Rounding

ROUNDED = 12
"""Roundings of float32 on the way to a level of a quantised network, and from it, in any runtime's arithmetic."""


@dataclass(frozen=True, eq=False)
class Staircase(Layer):
    """t to step * clamp(whole(t / step), first, last), where `whole` takes a real number to a whole one, never falling.

    Interval: the values at both ends, exactly, as the function never falls. Where an evaluation may round t / step,
    it may land on the next step: ends are moved outwards by that before they are rounded.

    Lines: the corners at which steps end lie on t - below, those at which they begin on t + above, in steps. Over an
    interval [l, u] whose values go from f to g, the value lies above the line through the first of the lower corners,
    (f + below, f), that is as steep as to (u, g), but no steeper than 1, and below the line from (l, f) to the last of
    the upper ones, (g - above, g), if that is flatter than 1, else below t + above. A flat line at f or g is taken
    instead where it is closer in the middle, as between two steps. Where l lies before `first`, as with a rectifier
    that is part of the steps, the lower line is the flat one for the slope "zero", never for "one", and no steeper
    than the upper one for "same".

    Attributes:
        whole: torch.round (half to even), floor or ceil.
        below, above: by how much it may lie under and over its argument: 1/2 and 1/2, 1 and 0, or 0 and 1.
        step: of a shape that broadcasts with one record; 1 for plain rounding.
        first, last: numbers of the outermost steps, likewise; None for no end.
    """

    whole: Callable[[Tensor], Tensor]
    below: float
    above: float
    step: Tensor | None = None
    first: Tensor | None = None
    last: Tensor | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        x = self.numbers(inputs[0])
        return x if self.step is None else x * self.step

    def numbers(self, x: Tensor) -> Tensor:
        """Of the steps on which `x` comes to lie."""
        x = self.whole(x if self.step is None else x / self.step)
        if self.first is not None and self.last is not None:
            x = torch.minimum(torch.maximum(x, self.first), self.last)
        return x

    def bounds(self, inputs: Sequence[Interval], rounding: Rounding | None) -> Interval:
        if rounding is None:
            return Interval(self(inputs[0].lower), self(inputs[0].upper))
        left, right = self._ends(inputs[0], rounding)
        low, high = self(left), self(right)
        error = self._product(Interval(low, high), rounding)
        known = inputs[0].size.isfinite()  # clamping would hide that nothing is
        return Interval((low - error).where(known, -math.inf), (high + error).where(known, math.inf)).checked(rounding)

    def pull(
        self,
        rows: Tensor,
        inputs: Sequence[Interval],
        output: Interval,
        slope: str | Tensor,
        rounding: Rounding | None,
        steps: int,
    ) -> Pulled:
        middle = inputs[0].middle
        step = torch.ones_like(middle) if self.step is None else self.step.expand(middle.shape)
        left, right = self._ends(inputs[0], rounding)
        bottom, top = self.numbers(left) * step, self.numbers(right) * step
        below, above = self.below * step, self.above * step
        # Below through the first corner (bottom + below, bottom), above through the last one (top - above, top).
        rise = _chord(top - bottom, right - bottom - below)
        ride = _chord(top - bottom, top - above - left)
        clipped = torch.zeros_like(rise, dtype=torch.bool) if self.first is None else left < step * self.first - above
        named = slope if isinstance(slope, str) else "adaptive"
        if named == "same":
            rise = torch.minimum(rise, ride).where(clipped, rise)
        under, over = bottom - rise * (bottom + below), top - ride * (top - above)
        closer, nearer = rise * middle + under > output.lower, ride * middle + over < output.upper
        if named != "adaptive":
            closer = closer.where(~clipped, named != "zero")
        rise, under = rise.where(closer, 0.0), under.where(closer, output.lower)
        ride, over = ride.where(nearer, 0.0), over.where(nearer, output.upper)
        falling = rows.clamp(max=0.0)
        rising = rows - falling
        pulled = rising * rise.unsqueeze(1) + falling * ride.unsqueeze(1)
        constant = inner(rising, under) + inner(falling, over)
        if rounding is not None:
            count = rows[0, 0].numel() + 4 * steps
            slack = rounding.backward(0, count) * 8 * (inputs[0].size + output.size + step) + rounding.least(count)
            # The value at t is that at some t' no farther from t than t is moved, and slopes are at most 1.
            slack = slack + self._moved(inputs[0], rounding) + self._product(output, rounding)
            constant = constant - inner(rows.abs(), slack)
        return Pulled((pulled,), constant)

    def _ends(self, before: Interval, rounding: Rounding | None) -> tuple[Tensor, Tensor]:
        """Of the interval of t, moved outwards."""
        moved = 0.0 if rounding is None else self._moved(before, rounding)
        return before.lower - moved, before.upper + moved

    def _moved(self, before: Interval, rounding: Rounding) -> Tensor:
        """By how much the argument may be off in units of t: a division, or a product with a rounded inverse."""
        if self.step is None:
            return torch.zeros_like(before.size)
        return rounding.forward(4) * before.size + rounding.least(4)

    def _product(self, output: Interval, rounding: Rounding) -> Tensor:
        if self.step is None:
            return torch.zeros_like(output.lower)
        return rounding.forward(4) * output.size + rounding.least(4)


@dataclass(frozen=True, eq=False)
class Levels(Staircase):
    """t to the number of its step, plus `zero`: what a quantised network hands on in eight bits.

    Bounds hold for any of these ways to the level, with u the unit roundoff of float32: t as the layers before compute
    it in float32, divided by the step; or an exact sum of products of integers, turned into a float (u), times the
    product of two scales over the step (two or three u, and u for the product), rounded to even or away from 0, the
    zero added before or after. ROUNDED of them, relative to |t| and to the zero in units of t, are more than all
    together; what the scales of weights and inputs lose is the business of `Dequantised`.

    Attributes:
        zero: the number of the level that stands for 0; `first` and `last` are the outermost levels minus this.
    """

    zero: Tensor = field(default_factory=lambda: torch.zeros(()))

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.numbers(inputs[0]) + self.zero

    def pull(
        self,
        rows: Tensor,
        inputs: Sequence[Interval],
        output: Interval,
        slope: str | Tensor,
        rounding: Rounding | None,
        steps: int,
    ) -> Pulled:
        step = torch.ones_like(self.zero) if self.step is None else self.step
        heights = Interval((output.lower - self.zero) * step, (output.upper - self.zero) * step)
        pulled = super().pull(rows / step, inputs, heights, slope, rounding, steps)
        zero = self.zero.expand(rows.shape[2:])[None]
        constant = pulled.constant + inner(rows, zero)
        if rounding is not None:
            error = rounding.backward(0, rows[0, 0].numel() + 4 * steps)
            constant = constant - inner(rows.abs(), error * zero.abs())
        return Pulled(pulled.rows, constant)

    def _moved(self, before: Interval, rounding: Rounding) -> Tensor:
        step = torch.ones_like(self.zero) if self.step is None else self.step
        return rounding.forward(ROUNDED) * (before.size + self.zero.abs() * step) + rounding.least(ROUNDED)

    def _product(self, output: Interval, rounding: Rounding) -> Tensor:
        return torch.zeros_like(output.lower)  # a whole number has no error


@dataclass(frozen=True, eq=False)
class Dequantised(Scale):
    """(level - zero) * step: levels as numbers again.

    Off by ROUNDED roundings relative to (|level| + |zero|) * step. That covers what the layer behind loses where it
    works on the integers: the scales of the weights as float32, and sums of levels with the zeros taken off at last.
    """

    zero: Tensor = field(default_factory=lambda: torch.zeros(()))

    @classmethod
    def of(cls, step: Tensor, zero: Tensor) -> Dequantised:
        return cls(step, -zero * step, None, ROUNDED, zero)

    def __call__(self, *inputs: Tensor) -> Tensor:
        return (inputs[0] - self.zero) * self.factor


def _chord(height: Tensor, width: Tensor) -> Tensor:
    """A slope in [0, 1]; 0 where there is no height, and 1 where there is, but no width."""
    return (height / width.where(width > 0, 1.0)).where(width > 0, 1.0).clamp(0.0, 1.0) * (height > 0)
