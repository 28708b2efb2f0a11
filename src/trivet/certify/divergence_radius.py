"""From bounds on expected scores to a radius, for classifiers that are functions of a noisy release.

If the release at x' is (eps, delta)-indistinguishable from that at x, and the scores E f_k lie in [0, 1], then
E f_c(x) >= e^(2 eps) E f_k(x) + (1 + e^eps) delta for all k != c keeps c the largest at x' (Lecuyer et al., IEEE S&P
2019, proposition 1). Radii are in units of the noise: a layer whose output moves by at most u scales of its noise for
a unit change of the input has radius / u in input units. `lower` and `upper` bound E f_c and max_k E f_k.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from trivet.models.gaussian_mechanism import heterogeneous_multiplier
from trivet.statistics import gaussian_delta

Bound = Literal["classical", "heterogeneous", "analytic"]

_DELTAS = torch.arange(1, 300, dtype=torch.float64) / 1000
_STEPS = 100


def laplace_reach(lower: float, upper: float) -> float:
    """ln(lower / upper) / 2: pure eps = radius / scale, so that eps = reach is the most that keeps the order."""
    return _rounded_down(math.log(lower / upper) / 2) if lower > upper > 0 else 0.0


def gaussian_reach(lower: float, upper: float, bound: Bound = "classical") -> float:
    """The largest radius / sigma over the (eps, delta) that `bound` allows the Gaussian mechanism.

    "classical": radius / sigma = eps / sqrt(2 ln(1.25 / delta)), delta in {0.001, …, 0.299} and eps in (0, 1], beyond
    which the mechanism has no proof; PixelDP's. "heterogeneous": the bound of SecureSGD, any eps. "analytic": the
    exact one of Balle & Wang, any eps. All lie below Cohen et al.'s (Phi^-1(lower) - Phi^-1(upper)) / 2, which is
    tight.
    """
    if not lower > upper > 0:
        return 0.0
    return _rounded_down(_classical(lower, upper) if bound == "classical" else _searched(lower, upper, bound))


def _classical(lower: float, upper: float) -> float:
    delta: Tensor = _DELTAS[lower > _DELTAS]
    # With z = e^eps the condition is upper z^2 + delta z + (delta - lower) <= 0: its larger root is the largest z.
    z = (-delta + (delta**2 + 4 * upper * (lower - delta)).sqrt()) / (2 * upper)
    eps = z.clamp_min(1).log().clamp_max(1)
    reach = eps / (2 * (1.25 / delta).log()).sqrt()
    return float(reach.max()) if len(reach) else 0.0


def _searched(lower: float, upper: float, bound: Bound) -> float:
    """Over a grid of eps: any subset of them gives a sound radius, and a hundred come near the best."""
    most, best = math.log(lower / upper) / 2, 0.0
    for step in range(1, _STEPS):
        eps = most * step / _STEPS
        delta = (lower - math.exp(2 * eps) * upper) / (1 + math.exp(eps))
        if bound == "analytic":
            best = _farthest(eps, delta, best)
        elif 0 < delta < 0.5:
            best = max(best, 1 / heterogeneous_multiplier(eps, delta))
    return best


def _farthest(eps: float, delta: float, best: float) -> float:
    """The largest shift above `best` with gaussian_delta(eps, shift) <= delta, from below; `best` if there is none."""
    if delta <= 0 or gaussian_delta(eps, best * (1 + 1e-9) + 1e-9) > delta:
        return best
    low, high = best, max(2 * best, 1.0)
    while gaussian_delta(eps, high) <= delta:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_delta(eps, middle) <= delta else (low, middle)
    return low


def _rounded_down(reach: float) -> float:
    return max(0.0, reach * (1 - 1e-9))
