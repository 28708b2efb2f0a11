"""Accounts against closed forms, exact integrals, two other libraries, published values and each other."""

import math
import sys

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr

from trivet.errors import BadValue, TrivetError
from trivet.privacy import accounting
from trivet.privacy.accounting import account, delta_for, noise_for, shuffled_lower_bound
from trivet.privacy.mechanism import Event


def poisson(z: float, q: float, noise: str = "gaussian") -> Event:
    return Event("poisson", q, z, noise=noise)


def shuffled(z: float, per_pass: int, adjacency: str = "zero_out") -> Event:
    return Event("shuffled", 1 / per_pass, z, adjacency)


def epsilon(z: float, q: float, steps: int, delta: float = 1e-5) -> float:
    return account([(poisson(z, q), steps)], delta, refine=False).epsilon


# Published and known values.


def test_the_published_reference_values() -> None:
    first = account([(poisson(1, 0.01), 1000)], 1e-5)
    assert first.rdp == pytest.approx(2.101, rel=1e-3)
    assert first.epsilon == pytest.approx(1.829, abs=1e-3)
    second = account([(poisson(4, 0.01), 10000)], 1e-5)
    assert second.rdp == pytest.approx(1.036, abs=1e-3)
    assert second.epsilon == pytest.approx(0.947, abs=1e-3)
    third = account([(poisson(1, 1), 1)], 1e-5)
    assert third.epsilon == pytest.approx(4.3772, abs=1e-4)
    assert third.rdp == pytest.approx(4.7284, abs=1e-3)


@pytest.mark.parametrize(("grid", "expected"), [(1e-3, 0.960), (1e-4, 0.947)])
def test_a_coarse_grid_states_more_and_refining_mends_it(grid, expected) -> None:
    total = accounting._merged([(poisson(4, 0.01), 10000)])
    assert accounting._epsilon_on(total, 1e-5, grid) == pytest.approx(expected, abs=1e-3)


def test_many_tiny_steps_are_refined_until_it_is_right() -> None:
    """On grids of 1e-3 and 1e-4 it would be 0.103 and 0.0326."""
    found = account([(poisson(7.1, 1 / 1875), 18750)], 1e-5)
    assert found.epsilon == pytest.approx(0.0283, abs=1e-4)
    assert found.rdp == pytest.approx(0.0332, rel=0.05)
    assert found.grid < 1e-5


@pytest.mark.parametrize(
    ("z", "amplified", "shuffled_at_least", "not_amplified"),
    [
        (0.4, 8.63, 14.45, 14.45),
        (0.5, 4.24, 11.00, 11.00),
        (0.7, 0.98, 7.31, 7.37),
        (1, 0.19, 3.72, 4.89),
        (2, 0.06, 0.11, 2.25),
    ],
)
def test_shuffling_is_not_sampling(z, amplified, shuffled_at_least, not_amplified) -> None:
    """One pass of 1000 steps at delta 1e-6: what shuffling leaks at least lies far above the account of sampling."""
    sampled = account([(poisson(z, 1e-3), 1000)], 1e-6, refine=False).epsilon
    lower = shuffled_lower_bound(z, 1000, 1e-6)
    ours = account([(shuffled(z, 1000), 1000)], 1e-6).epsilon
    assert sampled == pytest.approx(amplified, abs=0.02)
    assert lower == pytest.approx(shuffled_at_least, abs=0.006)
    assert ours == pytest.approx(not_amplified, abs=0.006)
    assert sampled < lower < ours


# The Gaussian in closed form.


@pytest.mark.parametrize("mu", [1e-4, 0.01, 0.5, 1.0, 2.0, 30.0, 300.0])
@pytest.mark.parametrize("delta", [1e-300, 1e-30, 1e-5, 0.3])
def test_the_gaussian_is_exact_in_both_tails(mu, delta) -> None:
    """Against the formula of Balle & Wang in 400 digits."""
    found = account([(poisson(1 / mu, 1.0), 1)], delta).epsilon
    with mpmath.workdps(400):

        def exact(eps: float) -> mpmath.mpf:
            eps, m = mpmath.mpf(eps), mpmath.mpf(1 / (1 / mu))
            return mpmath.ncdf(-eps / m + m / 2) - mpmath.exp(eps) * mpmath.ncdf(-eps / m - m / 2)

        assert exact(found * (1 + 1e-6)) <= delta
        assert found == 0 or exact(found * (1 - 1e-6)) > delta


@pytest.mark.parametrize(("z", "steps"), [(5.0, 25), (3.0, 7), (40.0, 1000)])
def test_steps_on_all_records_are_one_gaussian_with_less_noise(z, steps) -> None:
    many, one = account([(poisson(z, 1), steps)], 1e-5), account([(poisson(z / math.sqrt(steps), 1), 1)], 1e-5)
    assert many.epsilon == pytest.approx(one.epsilon, rel=1e-9)


def test_events_without_sampling_add_their_squares() -> None:
    found = account([(poisson(3, 1), 9), (poisson(4, 1), 16)], 1e-5).epsilon
    assert found == pytest.approx(account([(poisson(1 / math.sqrt(2), 1), 1)], 1e-5).epsilon, rel=1e-9)


@pytest.mark.parametrize(("steps", "passes"), [(1, 1), (9, 1), (10, 1), (11, 2), (30, 3)])
def test_a_begun_pass_counts_whole_where_batches_are_shuffled(steps, passes) -> None:
    found = account([(shuffled(2.0, 10), steps)], 1e-5).epsilon
    assert found == pytest.approx(account([(poisson(2.0, 1), passes)], 1e-5).epsilon, rel=1e-12)


# Poisson samples against exact integrals and other libraries.


def exact_single_step(z: float, q: float, delta: float) -> float:
    """Of one step: removing a record tells more than adding one, and the likelihood ratio rises in x, so that
    delta(eps) = P(x > t) - e^eps Q(x > t) where the ratio is e^eps at t."""

    def at(eps: float) -> float:
        t = z * z * math.log1p(math.expm1(eps) / q) + 0.5
        return (1 - q) * ndtr(-t / z) + q * ndtr((1 - t) / z) - math.exp(eps) * ndtr(-t / z)

    low, high = 0.0, 50.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if at(middle) <= delta else (middle, high)
    return high


@pytest.mark.parametrize(("z", "q"), [(0.5, 0.1), (1.0, 0.004), (1.0, 0.5), (3.0, 0.2), (0.7, 0.9)])
def test_one_sampled_step_is_its_integral(z, q) -> None:
    found, exact = account([(poisson(z, q), 1)], 1e-5), exact_single_step(z, q, 1e-5)
    assert found.lower <= exact <= found.epsilon
    assert found.epsilon == pytest.approx(exact, rel=3e-3)
    assert found.lower == pytest.approx(exact, rel=0.03)


@pytest.mark.parametrize(("z", "steps"), [(2.0, 5), (30.0, 1000)])
def test_a_sample_of_almost_everything_is_a_gaussian(z, steps) -> None:
    """Ties the composed distributions, at any delta that is accepted, to the closed form."""
    for delta in (1e-10, 1e-5):
        found, exact = account([(poisson(z, 1 - 1e-9), steps)], delta), account([(poisson(z, 1), steps)], delta)
        assert found.lower <= exact.epsilon <= found.epsilon
        assert found.epsilon == pytest.approx(exact.epsilon, rel=2e-3)
        assert found.rdp == pytest.approx(exact.rdp, rel=1e-6)


@pytest.mark.parametrize(("z", "q", "steps"), [(1.0, 0.01, 1000), (0.6, 0.002, 500), (2.0, 0.2, 50)])
def test_renyi_divergences_agree_with_a_second_library(z, q, steps) -> None:
    from opacus.accountants.analysis import rdp

    orders = [*(1 + x / 10 for x in range(1, 150)), *range(16, 64)]
    theirs, _ = rdp.get_privacy_spent(
        orders=orders, rdp=rdp.compute_rdp(q=q, noise_multiplier=z, steps=steps, orders=orders), delta=1e-5
    )
    assert account([(poisson(z, q), steps)], 1e-5).rdp == pytest.approx(theirs, rel=5e-3)


@pytest.mark.parametrize(("z", "q", "steps"), [(1.0, 0.01, 1000), (2.0, 0.2, 50)])
def test_numerical_composition_agrees_with_a_second_library(z, q, steps) -> None:
    """Its own error bound is 0.01."""
    from opacus.accountants import PRVAccountant

    other = PRVAccountant()
    other.history = [(z, q, steps)]
    found = account([(poisson(z, q), steps)], 1e-5)
    theirs = other.get_epsilon(1e-5, eps_error=0.01)
    assert found.epsilon == pytest.approx(theirs, abs=0.01)
    assert found.lower <= theirs


# The three accountants against each other, and what must be monotone.

noise = st.floats(0.4, 20)
rates = st.floats(1e-3, 0.999)
counts = st.integers(1, 1000)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(noise, rates, counts, st.sampled_from([1e-9, 1e-6, 1e-3]))
def test_renyi_bounds_the_distribution_bounds_its_optimistic_twin(z, q, steps, delta) -> None:
    found = account([(poisson(z, q), steps)], delta)
    assert 0 <= found.lower <= found.epsilon <= found.rdp * 1.001 + 1e-12
    assert found.epsilon <= account([(poisson(z, q), steps)], delta, refine=False).epsilon
    assert found.epsilon <= account([(poisson(z, 1), steps)], delta).epsilon * 1.01


@settings(max_examples=10, deadline=None, derandomize=True)
@given(noise, rates, counts)
def test_more_noise_costs_less_and_more_steps_or_records_cost_more(z, q, steps) -> None:
    """Each is first put on its own grid, which differ by some tenths of a per cent."""
    here = epsilon(z, q, steps)
    assert epsilon(1.2 * z, q, steps) <= 1.005 * here
    assert epsilon(z, q, 2 * steps) >= 0.995 * here
    assert epsilon(z, q + (1 - q) / 2, steps) >= 0.995 * here


def test_the_limits_are_zero_and_infinity() -> None:
    assert epsilon(1e6, 0.1, 100) == pytest.approx(0, abs=1e-4)
    assert epsilon(1, 1e-7, 1) == pytest.approx(0, abs=1e-4)
    assert account([(poisson(1, 0.01), 0)], 1e-5).epsilon == 0
    assert account([], 1e-5).epsilon == 0
    assert account([(poisson(0, 0.01), 1)], 1e-5).epsilon == math.inf
    assert account([(poisson(0, 1), 1), (poisson(5, 0.1), 3)], 1e-5).epsilon == math.inf
    assert account([(poisson(1e-9, 0.5), 1)], 1e-5).epsilon == math.inf
    assert delta_for([(poisson(0, 1), 1)], 3.0) == 1
    assert delta_for([], 0.0) == 0


def test_equal_steps_told_in_two_parts_cost_the_same() -> None:
    whole = account([(poisson(2, 0.1), 60)], 1e-5)
    assert account([(poisson(2, 0.1), 20), (poisson(2, 0.1), 40)], 1e-5) == whole


def test_unequal_steps_compose() -> None:
    """Samples of almost everything, so that the answer is known: mu^2 = 30 / 9 / 9 + 50 / 100 + 10 / 25."""
    near = 1 - 1e-9
    found = account([(poisson(9, near), 30), (poisson(10, near), 50), (poisson(5, 1), 10)], 1e-5)
    exact = account([(poisson(1 / math.sqrt(30 / 81 + 0.9), 1), 1)], 1e-5).epsilon
    assert found.lower <= exact <= found.epsilon <= 1.003 * exact
    assert exact <= found.rdp


def test_delta_and_epsilon_are_inverse() -> None:
    for spent in ([(poisson(1, 0.05), 30)], [(poisson(3, 1), 4)]):
        assert delta_for(spent, account(spent, 1e-6).epsilon) == pytest.approx(1e-6, rel=0.02)


# Calibration.


@pytest.mark.parametrize("target", [0.2, 5.0])
@pytest.mark.parametrize(
    ("event", "steps"),
    [
        (poisson(1, 0.05), 100),
        (poisson(1, 0.3), 20),
        (poisson(1, 1), 30),
        (shuffled(1, 10), 25),
        (shuffled(1, 10, "replace"), 10),
        (poisson(1, 0.01, "discrete_gaussian"), 300),
    ],
)
def test_calibrated_noise_keeps_to_its_target_tightly(event, steps, target) -> None:
    def spends(z: float) -> float:
        kept = Event(event.sampler, event.rate, z, event.adjacency, event.noise)
        return account([(kept, steps)], 1e-5).epsilon

    z = noise_for(event, steps, target, 1e-5)
    assert spends(z) <= target
    assert spends(z * 0.995) > target


def test_impossible_targets_are_refused() -> None:
    for target in (0.0, -1.0, math.inf):
        with pytest.raises(BadValue, match="must be positive and finite"):
            noise_for(poisson(1, 0.1), 10, target, 1e-5)
    with pytest.raises(BadValue, match="steps=0"):
        noise_for(poisson(1, 0.1), 0, 1.0, 1e-5)
    with pytest.raises(BadValue, match="almost without noise"):
        noise_for(poisson(1, 1e-6), 1, 1.0, 0.01)


# Discrete noise, and what is refused.


@pytest.mark.parametrize("q", [1.0, 0.1])
def test_discrete_noise_is_accounted_by_renyi_divergence(q) -> None:
    """Never below the Gaussian's: it is the same bound at fewer orders."""
    found = account([(poisson(2, q, "discrete_gaussian"), 20)], 1e-5)
    gaussian = account([(poisson(2, q), 20)], 1e-5)
    assert gaussian.rdp <= found.epsilon <= 1.02 * gaussian.rdp
    assert "discrete" in found.accountant
    assert found.lower == 0
    with pytest.raises(BadValue, match="at a given delta"):
        delta_for([(poisson(2, q, "discrete_gaussian"), 20)], 1.0)


def test_what_cannot_be_accounted_for_is_refused() -> None:
    with pytest.raises(BadValue, match="must be one"):
        account([(poisson(1, 0.1), 1), (shuffled(1, 10), 1)], 1e-5)
    with pytest.raises(BadValue, match="whole number of steps"):
        account([(Event("shuffled", 0.3, 1.0, "zero_out"), 1)], 1e-5)
    with pytest.raises(BadValue, match="steps=-1"):
        account([(poisson(1, 0.1), -1)], 1e-5)
    for delta in (0.0, 1.0, -1e-5):
        with pytest.raises(BadValue, match="strictly between 0 and 1"):
            account([(poisson(1, 0.1), 1)], delta)
    with pytest.raises(BadValue, match="drowns"):
        account([(poisson(1, 0.1), 1)], 1e-12)
    with pytest.raises(BadValue, match="must not be negative"):
        delta_for([(poisson(1, 0.1), 1)], -1.0)


def test_without_the_package_one_sentence_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting.pld", None)
    with pytest.raises(TrivetError, match=r"pip install 'trivet\[private\]'"):
        account([(poisson(1.2345, 0.1), 1)], 1e-5)
    assert account([(poisson(1.2345, 1), 1)], 1e-5).epsilon > 0


def test_the_lower_bound_for_shuffling_holds_for_one_step_exactly() -> None:
    """One step of one batch: means 2 against 1 with noise z, a Gaussian with mu = 1 / z."""
    for z in (0.5, 1.0, 3.0):
        exact = account([(poisson(z, 1), 1)], 1e-5).epsilon
        assert shuffled_lower_bound(z, 1, 1e-5) == pytest.approx(exact, rel=1e-3)
        assert shuffled_lower_bound(z, 1, 1e-5) <= exact
    assert np.isfinite(shuffled_lower_bound(100.0, 10, 1e-5))
