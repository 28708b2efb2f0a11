"""Exact intervals for rates, and the one Gaussian identity that smoothing, privacy and policies share.

All in float64. scipy is imported where it is used: it costs half a second, and most commands need none of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trivet.errors import require


def binomial_lower(successes: int, trials: int, alpha: float) -> float:
    """One-sided Clopper-Pearson lower bound: P(bound <= true rate) >= 1 - alpha (Clopper & Pearson 1934)."""
    require(0 <= successes <= trials, f"successes={successes} must lie between 0 and trials={trials}.")
    require(0 < alpha < 1, f"alpha={alpha} must lie strictly between 0 and 1.")
    if successes == 0:
        return 0.0
    from scipy.special import betaincinv

    return float(betaincinv(successes, trials - successes + 1, alpha))


def binomial_upper(successes: int, trials: int, alpha: float) -> float:
    """One-sided Clopper-Pearson upper bound, by symmetry."""
    return 1.0 - binomial_lower(trials - successes, trials, alpha)


@dataclass(frozen=True)
class Rate:
    """`successes` out of `trials`, with its two-sided exact interval at the stated `confidence`."""

    successes: int
    trials: int
    confidence: float = 0.95

    @property
    def value(self) -> float:
        """The rate; NaN-free: no trials count as rate 0 with the interval [0, 1]."""
        return self.successes / self.trials if self.trials else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        if not self.trials:
            return 0.0, 1.0
        tail = (1.0 - self.confidence) / 2.0
        return (
            binomial_lower(self.successes, self.trials, tail),
            binomial_upper(self.successes, self.trials, tail),
        )

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def normal_quantile(probability: float) -> float:
    """Phi^{-1}; minus and plus infinity at 0 and 1."""
    from scipy.special import ndtri

    return float(ndtri(probability))


def gaussian_shift(probability: float, shift: float) -> float:
    """Phi(Phi^{-1}(p) - shift): the least probability an event of probability p keeps when a Gaussian's mean moves.

    `shift` counts standard deviations. This is the trade-off function of `shift`-Gaussian differential privacy
    (Dong, Roth & Su 2022) and the bound behind randomized smoothing (Cohen et al. 2019).
    """
    return 0.5 * math.erfc(-(normal_quantile(probability) - shift) / math.sqrt(2.0))
