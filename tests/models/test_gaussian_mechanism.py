"""The three Gaussian bounds against fifty digits, and against each other."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trivet.errors import BadValue
from trivet.models.gaussian_mechanism import (
    analytic_multiplier,
    classical_multiplier,
    heterogeneous_multiplier,
)
from trivet.statistics import gaussian_delta


@pytest.mark.parametrize(
    ("epsilon", "shift"), [(0.0, 1.0), (1.0, 0.5), (0.1, 0.03), (4.0, 2.0), (8.0, 1.0), (0.5, 5.0)]
)
def test_delta_is_the_positive_part_of_the_difference_of_the_two_densities(epsilon: float, shift: float) -> None:
    """Integral of max(0, N(t; shift, 1) - e^epsilon N(t; 0, 1)): the definition, at fifty digits."""
    with mpmath.workdps(50):
        crossing = mpmath.mpf(shift) / 2 + mpmath.mpf(epsilon) / mpmath.mpf(shift)
        area = mpmath.quad(
            lambda t: mpmath.npdf(t, shift, 1) - mpmath.exp(epsilon) * mpmath.npdf(t, 0, 1),
            [crossing, crossing + 1, crossing + 3, crossing + 10, crossing + 40],
        )
        assert gaussian_delta(epsilon, shift) == pytest.approx(float(area), rel=1e-10)


def test_published_epsilons_of_the_unit_shift() -> None:
    for shift, epsilon in [(1.0, 4.3772), (0.5, 1.993), (2.0, 9.997)]:
        assert gaussian_delta(epsilon, shift) == pytest.approx(1e-5, rel=3e-3)
        assert 1 / analytic_multiplier(epsilon, 1e-5) == pytest.approx(shift, rel=1e-3)


def test_the_heterogeneous_bound_leaves_the_true_delta_far_below_the_asked_one() -> None:
    for epsilon, true in [(0.1, 4.1e-9), (8.0, 2.25e-7)]:
        assert gaussian_delta(epsilon, 1 / heterogeneous_multiplier(epsilon, 1e-5)) == pytest.approx(true, rel=0.01)


def test_both_closed_bounds_are_sound_wherever_they_are_accepted() -> None:
    for delta in np.geomspace(1e-12, 0.4999, 60):
        for epsilon in np.geomspace(1e-3, 60, 60):
            assert gaussian_delta(epsilon, 1 / heterogeneous_multiplier(epsilon, delta)) <= delta
            if epsilon <= 1 and delta < 0.3:
                assert gaussian_delta(epsilon, 1 / classical_multiplier(epsilon, delta)) <= delta


def test_the_classical_bound_is_false_for_large_epsilon_which_is_why_it_is_refused() -> None:
    epsilon, delta = 10.0, 0.1
    assert gaussian_delta(epsilon, epsilon / math.sqrt(2 * math.log(1.25 / delta))) > delta
    with pytest.raises(BadValue, match=r"epsilon=10.0 must lie in"):
        classical_multiplier(epsilon, delta)


@settings(deadline=None, max_examples=60)
@given(st.floats(0.01, 20), st.floats(1e-9, 0.29))
def test_the_analytic_bound_is_sound_and_no_smaller_noise_is(epsilon: float, delta: float) -> None:
    multiplier = analytic_multiplier(epsilon, delta)
    assert gaussian_delta(epsilon, 1 / multiplier) <= delta
    assert gaussian_delta(epsilon, 1.0001 / multiplier) > delta
    assert multiplier <= heterogeneous_multiplier(epsilon, delta)
    if epsilon <= 1:
        assert multiplier <= classical_multiplier(epsilon, delta)


@pytest.mark.parametrize(
    ("bound", "epsilon", "delta", "complaint"),
    [
        (classical_multiplier, 0.0, 0.05, "epsilon=0.0"),
        (classical_multiplier, 1.0, 0.3, "delta=0.3"),
        (heterogeneous_multiplier, 0.0, 0.05, "epsilon=0.0"),
        (heterogeneous_multiplier, math.nan, 0.05, "epsilon=nan"),
        (heterogeneous_multiplier, 1.0, 0.0, "delta=0.0"),
        (heterogeneous_multiplier, 1.0, 0.7, "delta=0.7"),
        (analytic_multiplier, -1.0, 0.1, "epsilon=-1.0"),
        (analytic_multiplier, 1.0, 1.0, "delta=1.0"),
    ],
)
def test_numbers_outside_a_bounds_range_are_refused(bound, epsilon: float, delta: float, complaint: str) -> None:
    with pytest.raises(BadValue, match=complaint):
        bound(epsilon, delta)
