"""The warm-up regularizer of Shi et al. (NeurIPS 2021): intervals that neither explode nor switch all ReLUs one way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trivet.certify.bounds.interval import Interval

TOLERANCE = 0.5
"""tau: ratios above it cost nothing."""


def warm_up_penalty(first: Interval, before: Sequence[Interval]) -> Tensor:
    """The mean over ReLU layers of L_tight + L_relu, a scalar, where L_tight and L_relu are means over batch and units:

        L_tight = max(0, tau - r_0 / r) / tau,                            r, r_0 mean radii of layer and input,
        L_relu = (max(0, tau - q_1) + max(0, tau - q_2)) / tau,           c the centres of the intervals,
            q_1 = mean(c; active) / -mean(c; inactive),  q_2 = sum((c - mean c)^2; active) / same of the inactive,

    each q taken as min(q, 1/q). Active is l > 0, inactive u < 0. L_relu of a layer where a q is no number is left out.

    Args:
        first: the intervals of the inputs.
        before: those of the inputs of each ReLU layer.
    """
    start, total = first.radius.mean(), first.radius.new_zeros(())
    for interval in before:
        total = total + (TOLERANCE - start / interval.radius.mean().clamp(min=1e-12)).relu() / TOLERANCE
        total = total + _imbalance(interval)
    return total / max(len(before), 1)


def _imbalance(interval: Interval) -> Tensor:
    centre = interval.middle
    active, inactive = (interval.lower > 0).to(centre.dtype), (interval.upper < 0).to(centre.dtype)
    spread = (centre - centre.mean()).square()
    pairs = (
        ((centre * active).mean(), -(centre * inactive).mean()),
        ((spread * active).sum(), (spread * inactive).sum()),
    )
    # Judged before dividing: the gradient of a quotient that is no number would be none either.
    if not all(bool((one > 0) & (other > 0)) for one, other in pairs):
        return centre.new_zeros(())
    ratios = (torch.minimum(one / other, other / one) for one, other in pairs)
    return torch.stack([(TOLERANCE - ratio).relu() / TOLERANCE for ratio in ratios]).sum()
