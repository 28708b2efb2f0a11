"""Rounding to a grid, as quantised activations are: functions of single values that rise in steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trivet.certify.bounds.interval import Interval
from trivet.certify.bounds.layer import Layer, Pulled, inner
from trivet.certify.bounds.rounding import Rounding


@dataclass(frozen=True, eq=False)
class Staircase(Layer):
    """t to step * clamp(whole(t / step), first, last), where `whole` takes a real number to a whole one, never falling.

    Interval: the values at both ends, exactly, as the function never falls. Where an evaluation may round t / step,
    it may land on the next step: ends are moved outwards by that before they are rounded.

    Lines: with a = step * first and b = step * last the value lies within [-below, above] steps of min(max(t, a), b),
    whose lower hull over an interval is t, or the chord from max(l, a) to u, if u lies beyond b, and likewise above.
    The flat line at an end of the interval above is taken instead where it is closer in the middle, as between two
    steps.

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
        x = inputs[0] if self.step is None else inputs[0] / self.step
        x = self.whole(x)
        if self.first is not None and self.last is not None:
            x = torch.minimum(torch.maximum(x, self.first), self.last)
        return x if self.step is None else x * self.step

    def bounds(self, inputs: Sequence[Interval], rounding: Rounding | None) -> Interval:
        lower, upper = inputs[0].lower, inputs[0].upper
        if rounding is None:
            return Interval(self(lower), self(upper))
        moved = self._moved(inputs[0], rounding)
        low, high = self(lower - moved), self(upper + moved)
        output = Interval(low, high)
        error = self._product(output, rounding)
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
        lower, upper = inputs[0].lower, inputs[0].upper
        step = torch.ones_like(lower) if self.step is None else self.step.expand(lower.shape)
        bottom, top = lower, upper
        if self.first is not None and self.last is not None:
            bottom, top = (
                lower.clamp(step * self.first, step * self.last),
                upper.clamp(step * self.first, step * self.last),
            )
        # Below through (max(l, a), same) and (u, top); above through (l, bottom) and (min(u, b), same).
        rise = _chord(bottom, bottom, upper, top)
        ride = _chord(lower, bottom, top, top)
        under = bottom - rise * torch.maximum(lower, bottom) - self.below * step
        over = top - ride * torch.minimum(upper, top) + self.above * step
        middle = (lower + upper) / 2
        closer = rise * middle + under > output.lower
        nearer = ride * middle + over < output.upper
        rise, under = rise.where(closer, 0.0), under.where(closer, output.lower)
        ride, over = ride.where(nearer, 0.0), over.where(nearer, output.upper)
        falling = rows.clamp(max=0.0)
        rising = rows - falling
        pulled = rising * rise.unsqueeze(1) + falling * ride.unsqueeze(1)
        constant = inner(rising, under) + inner(falling, over)
        if rounding is not None:
            count = rows[0, 0].numel() + 4 * steps
            slack = rounding.backward(0, count) * 8 * (inputs[0].size + output.size + step) + rounding.least(count)
            # A step more or less by rounding t is no more than what t was moved by, plus the half it lies from t.
            slack = slack + self._moved(inputs[0], rounding) + self._product(output, rounding)
            constant = constant - inner(rows.abs(), slack)
        return Pulled((pulled,), constant)

    def _moved(self, before: Interval, rounding: Rounding) -> Tensor:
        """By how much the argument may be off in units of t: a division, or a product with a rounded inverse."""
        if self.step is None:
            return torch.zeros_like(before.size)
        return rounding.forward(4) * before.size + rounding.least(4)

    def _product(self, output: Interval, rounding: Rounding) -> Tensor:
        if self.step is None:
            return torch.zeros_like(output.lower)
        return rounding.forward(4) * output.size + rounding.least(4)


def _chord(left: Tensor, start: Tensor, right: Tensor, end: Tensor) -> Tensor:
    """The slope from (left, start) to (right, end), in [0, 1]; 0 where both are one point or lie in the wrong order."""
    width = right - left
    return ((end - start) / width.where(width > 0, 1.0)).clamp(0.0, 1.0) * (width > 0)
