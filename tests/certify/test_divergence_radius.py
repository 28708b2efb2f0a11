"""The radii of PixelDP against published numbers, brute force over (eps, delta), and exact linear classifiers."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from trivet.certify.divergence_radius import gaussian_reach, laplace_reach
from trivet.statistics import gaussian_delta, normal_quantile

BOUNDS = ("classical", "heterogeneous", "analytic")


def cohen(lower: float, upper: float) -> float:
    """The tight radius / sigma."""
    return (normal_quantile(lower) - normal_quantile(upper)) / 2


@pytest.mark.parametrize(("lower", "upper", "reach", "tight"), [(0.99, 0.01, 0.555, 2.326), (0.9, 0.1, 0.390, 1.282)])
def test_reference_values_of_the_gaussian_radius(lower: float, upper: float, reach: float, tight: float) -> None:
    assert gaussian_reach(lower, upper) == pytest.approx(reach, abs=5e-4)
    assert cohen(lower, upper) == pytest.approx(tight, abs=5e-4)


@settings(deadline=None, max_examples=30)
@given(st.floats(0.02, 0.9999), st.floats(1e-5, 0.9))
def test_every_gaussian_radius_lies_below_the_tight_one(lower: float, upper: float) -> None:
    assume(upper < lower and upper + lower <= 1)
    classical, heterogeneous, analytic = (gaussian_reach(lower, upper, bound) for bound in BOUNDS)  # type: ignore[arg-type]
    tight = cohen(lower, upper)
    assert 0 <= classical <= tight
    assert 0 <= heterogeneous <= analytic * 1.001 + 1e-9  # the analytic one is searched on a grid of eps
    assert analytic <= tight


@settings(deadline=None, max_examples=20)
@given(st.floats(0.3, 0.9999), st.floats(1e-5, 0.5))
def test_the_classical_radius_is_the_best_of_a_fine_grid_and_not_beaten_by_it(lower: float, upper: float) -> None:
    assume(upper < lower and upper + lower <= 1)
    eps, delta = np.meshgrid(np.linspace(1e-4, 1, 2_000), np.arange(1, 300) / 1000)
    allowed = lower >= np.exp(2 * eps) * upper + (1 + np.exp(eps)) * delta
    best = float(np.where(allowed, eps / np.sqrt(2 * np.log(1.25 / delta)), 0.0).max())
    assert best <= gaussian_reach(lower, upper) * (1 + 1e-8) + 1e-12
    assert gaussian_reach(lower, upper) <= best + 6e-4  # one step of the grid


def test_the_paper_writes_the_same_radius_through_its_construction_attack() -> None:
    """L (eps / eps0) sqrt(ln(1.25 / delta0) / ln(1.25 / delta)), for sigma = L sqrt(2 ln(1.25 / delta0)) / eps0."""
    lower, upper, size, eps0, delta0 = 0.8, 0.1, 0.3, 0.7, 0.05
    best = 0.0
    for delta in np.arange(1, 300) / 1000:
        for eps in np.linspace(0.001, 1, 1_000):
            if lower >= math.exp(2 * eps) * upper + (1 + math.exp(eps)) * delta:
                best = max(best, size * eps / eps0 * math.sqrt(math.log(1.25 / delta0) / math.log(1.25 / delta)))
    sigma = size * math.sqrt(2 * math.log(1.25 / delta0)) / eps0
    assert sigma * gaussian_reach(lower, upper) == pytest.approx(best, rel=3e-3)


@pytest.mark.parametrize("bound", ["heterogeneous", "analytic"])
def test_the_order_of_the_scores_survives_at_the_radius(bound: Any) -> None:
    """Some eps must satisfy the condition with the true delta of a shift as large as the radius."""
    for lower, upper in [(0.99, 0.01), (0.6, 0.2), (0.5, 0.001)]:
        shift = gaussian_reach(lower, upper, bound)
        grid = np.linspace(0, math.log(lower / upper) / 2, 2_001)
        slack = [lower - math.exp(2 * e) * upper - (1 + math.exp(e)) * gaussian_delta(float(e), shift) for e in grid]
        assert max(slack) >= -1e-9


@given(st.floats(0.01, 1.0), st.floats(1e-6, 0.99))
def test_the_laplace_radius_is_half_the_log_ratio(lower: float, upper: float) -> None:
    expected = math.log(lower / upper) / 2 if lower > upper else 0.0
    found = laplace_reach(lower, upper)
    assert found <= expected
    assert found == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(("lower", "upper"), [(0.5, 0.5), (0.2, 0.8), (0.0, 0.0), (0.5, 0.0)])
def test_scores_that_prove_nothing_have_no_radius(lower: float, upper: float) -> None:
    assert laplace_reach(lower, upper) == 0
    assert [gaussian_reach(lower, upper, bound) for bound in BOUNDS] == [0, 0, 0]  # type: ignore[arg-type]


@pytest.mark.parametrize("bound", BOUNDS)
def test_radii_grow_with_the_lower_bound_and_fall_with_the_upper(bound: Any) -> None:
    rising = [gaussian_reach(p, 0.1, bound) for p in np.linspace(0.15, 0.9, 12)]
    falling = [gaussian_reach(0.6, q, bound) for q in np.linspace(0.01, 0.4, 12)]
    assert all(a <= b * (1 + 1e-3) for a, b in pairwise(rising))
    assert all(a * (1 + 1e-3) >= b for a, b in pairwise(falling))
    assert rising[-1] > rising[0]
