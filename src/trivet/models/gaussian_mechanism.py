"""How much Gaussian noise hides a change: three bounds, for noise at test time and for noise on gradients alike.

A release f(x) + N(0, sigma^2 I) is (epsilon, delta)-indistinguishable from f(x') + N(0, sigma^2 I) for all
||f(x) - f(x')||_2 <= S if sigma / S is at least the number these functions return. All in float64.
"""

from __future__ import annotations

import math

from trivet.errors import require
from trivet.statistics import gaussian_mu


def classical_multiplier(epsilon: float, delta: float) -> float:
    """sqrt(2 ln(1.25 / delta)) / epsilon (Dwork & Roth 2014, theorem A.1); proved for epsilon of at most 1 only."""
    require(0 < epsilon <= 1, f"epsilon={epsilon} must lie in (0, 1]: the classical bound is false beyond it.")
    require(0 < delta < 0.3, f"delta={delta} must lie in (0, 0.3), where the classical bound was checked.")
    return math.sqrt(2 * math.log(1.25 / delta)) / epsilon


def heterogeneous_multiplier(epsilon: float, delta: float) -> float:
    """(sqrt(s) + sqrt(s + epsilon)) / (sqrt(2) epsilon), s = ln(sqrt(2 / pi) / delta), for every epsilon.

    The bound of the heterogeneous Gaussian mechanism (Phan et al., IJCAI 2019).
    """
    require(0 < epsilon < math.inf, f"epsilon={epsilon} must be positive and finite.")
    require(0 < delta < 0.5, f"delta={delta} must lie in (0, 0.5).")
    s = math.log(math.sqrt(2 / math.pi) / delta)
    return (math.sqrt(s) + math.sqrt(s + epsilon)) / (math.sqrt(2) * epsilon)


def analytic_multiplier(epsilon: float, delta: float) -> float:
    """The smallest sigma / S that is enough (Balle & Wang, ICML 2018), rounded up."""
    require(0 <= epsilon < math.inf, f"epsilon={epsilon} must be finite and not negative.")
    require(0 < delta < 1, f"delta={delta} must lie strictly between 0 and 1.")
    return (1 + 1e-12) / gaussian_mu(epsilon, delta)
