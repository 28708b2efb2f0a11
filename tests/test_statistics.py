"""Exact intervals against enumeration and another library, and the Gaussian shift against its closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, norm
from statsmodels.stats.proportion import proportion_confint

from trivet.errors import BadValue
from trivet.statistics import (
    Rate,
    binomial_lower,
    binomial_upper,
    gaussian_delta,
    gaussian_epsilon,
    gaussian_mu,
    gaussian_shift,
    normal_quantile,
)

N = 20


def _coverage(bounds: np.ndarray, rate: float) -> float:
    """P(bound <= rate) when successes ~ Binomial(20, rate), by enumeration."""
    return float(binom.pmf(np.arange(N + 1), N, rate)[bounds <= rate].sum())


@pytest.mark.parametrize("alpha", [0.001, 0.05, 0.3])
def test_the_lower_bound_covers_at_every_rate_by_enumeration(alpha: float) -> None:
    bounds = np.array([binomial_lower(k, N, alpha) for k in range(N + 1)])
    rates = np.linspace(0, 1, 2001)
    assert min(_coverage(bounds, rate) for rate in rates) >= 1 - alpha - 1e-12
    # And no better than it must be: at a bound itself, its own outcome and the higher ones have probability alpha.
    for successes, bound in enumerate(bounds[1:], start=1):
        assert binom.sf(successes - 1, N, bound) == pytest.approx(alpha, rel=1e-9)


def test_the_normal_approximation_does_not_cover_so_the_enumeration_has_power() -> None:
    share = np.arange(N + 1) / N
    wald = share - norm.isf(0.05) * np.sqrt(share * (1 - share) / N)
    assert min(_coverage(wald, rate) for rate in np.linspace(0.01, 0.99, 99)) < 0.9


def test_990_of_1000_at_alpha_one_thousandth_is_the_known_figure() -> None:
    assert binomial_lower(990, 1000, 0.001) == pytest.approx(0.976036, abs=5e-7)
    assert normal_quantile(binomial_lower(990, 1000, 0.001)) == pytest.approx(1.97801, abs=5e-6)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 5000), st.floats(0, 1), st.floats(1e-6, 0.5))
def test_bounds_agree_with_statsmodels(trials: int, share: float, alpha: float) -> None:
    successes = round(share * trials)
    low, high = proportion_confint(successes, trials, alpha=2 * alpha, method="beta")
    assert binomial_lower(successes, trials, alpha) == pytest.approx(low, rel=1e-9, abs=1e-12)
    assert binomial_upper(successes, trials, alpha) == pytest.approx(high, rel=1e-9, abs=1e-12)


def test_no_and_all_successes_have_closed_forms() -> None:
    assert binomial_lower(0, 50, 0.01) == 0.0
    assert binomial_upper(50, 50, 0.01) == 1.0
    assert binomial_lower(50, 50, 0.01) == pytest.approx(0.01 ** (1 / 50), rel=1e-12)
    assert binomial_upper(0, 50, 0.01) == pytest.approx(1 - 0.01 ** (1 / 50), rel=1e-12)


@pytest.mark.parametrize(("successes", "trials", "alpha"), [(-1, 5, 0.1), (6, 5, 0.1), (2, 5, 0.0), (2, 5, 1.0)])
def test_impossible_counts_and_levels_are_refused(successes: int, trials: int, alpha: float) -> None:
    with pytest.raises(BadValue, match=r"must lie"):
        binomial_lower(successes, trials, alpha)


def test_a_rate_prints_its_two_sided_interval() -> None:
    rate = Rate(45, 50)
    low, high = proportion_confint(45, 50, alpha=0.05, method="beta")
    assert rate.interval == pytest.approx((low, high), rel=1e-9)
    assert str(rate) == f"90.0 % [{100 * low:.1f}, {100 * high:.1f}]"
    wider = Rate(45, 50, confidence=0.99).interval
    assert wider[0] < low < high < wider[1]


def test_a_rate_of_nothing_is_zero_and_unknown() -> None:
    assert Rate(0, 0).value == 0.0
    assert Rate(0, 0).interval == (0.0, 1.0)


@settings(deadline=None, max_examples=50)
@given(st.floats(1e-9, 1 - 1e-9), st.floats(-4, 4), st.floats(-4, 4))
def test_gaussian_shifts_add_up_and_undo_each_other(probability: float, first: float, second: float) -> None:
    both = gaussian_shift(probability, first + second)
    assert gaussian_shift(gaussian_shift(probability, first), second) == pytest.approx(both, rel=1e-5, abs=1e-6)
    assert gaussian_shift(probability, 0.0) == pytest.approx(probability, rel=1e-9)
    assert both == pytest.approx(norm.cdf(norm.ppf(probability) - first - second), rel=1e-7)


def test_the_gaussian_shift_is_what_a_half_space_loses() -> None:
    # P(Z > c) = p becomes P(Z > c + mu) when the mean moves by mu against the half-space: nothing loses more.
    c, mu = -1.3, 0.7
    assert gaussian_shift(norm.sf(c), mu) == pytest.approx(norm.sf(c + mu), rel=1e-12)


def test_certain_and_impossible_events_stay_so_under_a_shift() -> None:
    assert gaussian_shift(1.0, 3.0) == 1.0
    assert gaussian_shift(0.0, -3.0) == 0.0
    assert normal_quantile(0.0) == -math.inf
    assert normal_quantile(1.0) == math.inf


@pytest.mark.parametrize(("mu", "epsilon"), [(1.0, 4.3772), (0.5, 1.993), (2.0, 9.997)])
def test_epsilon_of_a_gaussian_mechanism_has_its_known_values(mu: float, epsilon: float) -> None:
    assert gaussian_epsilon(mu, 1e-5) == pytest.approx(epsilon, abs=5e-4)
    assert gaussian_mu(gaussian_epsilon(mu, 1e-5), 1e-5) == pytest.approx(mu, rel=1e-9)


def test_delta_of_a_gaussian_mechanism_is_the_integral_of_what_one_side_has_too_much() -> None:
    x = np.linspace(-40, 40, 800_001)
    for mu, epsilon in [(1.0, 0.0), (0.3, 0.5), (3.0, 2.0), (2.0, 9.997)]:
        excess = np.maximum(0.0, norm.pdf(x - mu) - math.exp(epsilon) * norm.pdf(x))
        assert gaussian_delta(epsilon, mu) == pytest.approx(np.trapezoid(excess, x), rel=1e-4)


@settings(deadline=None)
@given(st.floats(0, 20), st.floats(0.01, 10), st.floats(1e-9, 0.1))
def test_mu_epsilon_and_delta_of_a_gaussian_mechanism_agree(epsilon: float, mu: float, delta: float) -> None:
    assert 0 <= gaussian_delta(epsilon, mu) <= gaussian_delta(0.0, mu) < 1
    least = gaussian_epsilon(mu, delta)
    assert gaussian_delta(least, mu) <= delta * (1 + 1e-9)
    assert least == 0 or gaussian_delta(least * (1 - 1e-6), mu) > delta * (1 - 1e-6)
    assert gaussian_delta(epsilon, gaussian_mu(epsilon, delta)) <= delta
    assert gaussian_epsilon(0.0, delta) == 0


def test_a_delta_that_means_nothing_is_refused() -> None:
    with pytest.raises(BadValue, match="delta=0 must lie"):
        gaussian_epsilon(1.0, 0)
    with pytest.raises(BadValue, match="delta=1 must lie"):
        gaussian_mu(1.0, 1)
    with pytest.raises(BadValue, match="mu=-1 must not"):
        gaussian_delta(1.0, -1)
