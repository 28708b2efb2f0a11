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


def gaussian_delta(epsilon: float, mu: float) -> float:
    """delta(epsilon) of mu-Gaussian differential privacy, where mu is sensitivity over standard deviation.

    Phi(-epsilon / mu + mu / 2) - e^epsilon Phi(-epsilon / mu - mu / 2) (Balle & Wang 2018; Dong, Roth & Su 2022).
    """
    require(mu >= 0, f"mu={mu} must not be negative.")
    if mu == 0:
        return max(0.0, -math.expm1(epsilon))
    from scipy.special import log_ndtr

    # In logarithms: both terms may be tiny, and close to each other.
    first = float(log_ndtr(mu / 2 - epsilon / mu))
    ratio = epsilon + float(log_ndtr(-mu / 2 - epsilon / mu)) - first
    return math.exp(first) * -math.expm1(min(ratio, 0.0))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The least epsilon >= 0 at which mu-Gaussian differential privacy is (epsilon, delta)-private."""
    require(0 < delta < 1, f"delta={delta} must lie strictly between 0 and 1.")
    if gaussian_delta(0.0, mu) <= delta:
        return 0.0
    # At the upper end the first term of delta(epsilon) alone is delta.
    low, high = 0.0, mu * mu / 2 - mu * normal_quantile(delta)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_delta(middle, mu) > delta else (low, middle)
    return high


def gaussian_mu(epsilon: float, delta: float) -> float:
    """The largest mu whose Gaussian differential privacy is still (epsilon, delta)-private: the converse."""
    require(epsilon >= 0, f"epsilon={epsilon} must not be negative.")
    require(0 < delta < 1, f"delta={delta} must lie strictly between 0 and 1.")
    low, high = 0.0, 1.0
    while gaussian_delta(epsilon, high) <= delta:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_delta(epsilon, middle) <= delta else (low, middle)
    return low
