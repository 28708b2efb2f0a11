"""Softmax: the exact range of each share over a box, and lines from the convexity of exponentials and inverses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trivet.certify.bounds.activations import ULPS
from trivet.certify.bounds.interval import Interval
from trivet.certify.bounds.layer import Layer, Pulled
from trivet.certify.bounds.rounding import Rounding


@dataclass(frozen=True, eq=False)
class Softmax(Layer):
    """Values [B, N, K] to shares p_i = exp(x_i) / sum_j exp(x_j) = 1 / D_i, D_i = 1 + sum_{j != i} exp(x_j - x_i).

    Interval: p_i grows with x_i and falls with every other, so that its range over a box is attained at two corners.

    Lines, as for transformers in Shi et al. (ICLR 2020) and Wei et al. (AISTATS 2023): D_i lies between sums of
    tangents and of chords of exp, which are linear in x. Below, 1 / D_i >= 2 / d - D_i / d^2, the tangent of the
    inverse at d, with the chords for D_i. Above, its chord 1 / D_i <= p_0 + p_1 - p_0 p_1 D_i over the interval
    [p_0, p_1] of p_i, with the tangents for D_i. An end of that interval is taken instead where it is closer in the
    middle, as between wide intervals, whose exponentials may not even be finite.

    Every value meets every other: N K^2 numbers for each record.
    """

    def __call__(self, *inputs: Tensor) -> Tensor:
        return inputs[0].softmax(-1)

    def bounds(self, inputs: Sequence[Interval], rounding: Rounding | None) -> Interval:
        low, high = inputs[0].lower, inputs[0].upper
        lower, upper = torch.sigmoid(low - _others(high)), torch.sigmoid(high - _others(low))
        if rounding is None:
            return Interval(lower, upper)
        error = self._error(inputs[0], rounding)
        # Shares of finite values are never computed as negative.
        lower, upper = lower - error, upper + error
        return Interval(lower.clamp(min=0.0).where(lower.isfinite(), lower), upper).checked(rounding)

    def pull(
        self,
        rows: Tensor,
        inputs: Sequence[Interval],
        output: Interval,
        slope: str | Tensor,
        rounding: Rounding | None,
        steps: int,
    ) -> Pulled:
        before = inputs[0]
        count = rows[0, 0].numel() + 4 * before.shape[-1] + 4 * steps
        error = 0.0 if rounding is None else rounding.backward(ULPS, count)
        below, above = self._lines(before, output, error)
        falling = rows.clamp(max=0.0)
        rising = rows - falling
        pulled = torch.einsum("bsni,bnij->bsnj", rising, below[0]) + torch.einsum("bsni,bnij->bsnj", falling, above[0])
        constant = torch.einsum("bsni,bni->bs", rising, below[1]) + torch.einsum("bsni,bni->bs", falling, above[1])
        if rounding is not None:
            slack = self._error(before, rounding) + rounding.least(count) + torch.zeros_like(below[1])
            constant = constant - torch.einsum("bsni,bni->bs", rows.abs(), slack)
        return Pulled((pulled,), constant)

    def _error(self, before: Interval, rounding: Rounding) -> Tensor | float:
        """Of computed shares: of their exponents, whose errors count as share times exponent, and of their sum."""
        # Our own exponents are differences of logarithms, with an error relative to the values themselves.
        size = before.size.amax(-1, keepdim=True)
        terms = 4 * (before.shape[-1] + 2 * ULPS)
        return terms * (rounding.network + rounding.ours) + 8 * rounding.ours * size

    def _lines(
        self, before: Interval, output: Interval, error: float
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Below and above: coefficients [B, N, K, K] of all x_j for each p_i, and constants [B, N, K]."""
        low, high = before.lower, before.upper
        k = low.shape[-1]
        own = torch.eye(k, dtype=torch.bool, device=low.device)
        # Differences x_j - x_i [B, N, i, j]; of i with itself exactly 0, whose exponential is the 1 in D_i.
        least = (low.unsqueeze(-2) - high.unsqueeze(-1)).masked_fill(own, 0.0)
        most = (high.unsqueeze(-2) - low.unsqueeze(-1)).masked_fill(own, 0.0)
        middle, width = (least + most) / 2, most - least
        size = (before.size.unsqueeze(-2) + before.size.unsqueeze(-1)).masked_fill(own, 0.0)
        steep = (least.exp() * torch.expm1(width) / width.clamp(min=1e-30)).where(width > 1e-30, least.exp())
        steep = steep.masked_fill(own, 0.0)
        chord = torch.maximum(least.exp() - steep * least, most.exp() - steep * most)
        tangent = middle.exp().masked_fill(own, 0.0)
        touch = middle.exp() - tangent * middle
        # What rounding moves in these, and in <coefficients, x> beside them.
        unsure = error * (most.exp() + (steep + tangent) * (1 + size)).sum(-1)
        p0, p1 = output.lower.clamp(min=0.0), output.upper
        at = (steep * middle + chord).sum(-1)
        flatter = -steep / at.square().unsqueeze(-1)
        below = _of_differences(flatter, own), 2 / at - (chord.sum(-1) + unsure) / at.square() - 8 * error / at
        product = p0 * p1
        steeper = -product.unsqueeze(-1) * tangent
        above = _of_differences(steeper, own), (p0 + p1) * (1 + error) - product * (touch.sum(-1) - unsure)
        places = (low + high) / 2
        return _closer(*below, places, p0, above=False), _closer(*above, places, p1, above=True)


def _others(x: Tensor) -> Tensor:
    """log sum_{j != i} exp(x_j) for each i of the last axis; minus infinity where there is no other."""
    own = torch.eye(x.shape[-1], dtype=torch.bool, device=x.device)
    return x.unsqueeze(-2).expand(*x.shape, x.shape[-1]).masked_fill(own, -torch.inf).logsumexp(-1)


def _of_differences(weights: Tensor, own: Tensor) -> Tensor:
    """sum_j w_ij (x_j - x_i) as coefficients of x_j, [..., i, j]."""
    return weights - own * weights.sum(-1, keepdim=True)


def _closer(weights: Tensor, constant: Tensor, middle: Tensor, flat: Tensor, *, above: bool) -> tuple[Tensor, Tensor]:
    """The line, or the constant `flat` where that is closer in the middle or the line no number."""
    value = (weights @ middle.unsqueeze(-1)).squeeze(-1) + constant
    better = (value < flat if above else value > flat) & weights.isfinite().all(-1)
    return weights.where(better.unsqueeze(-1), 0.0), constant.where(better, flat)
