"""The policy certificate against games with a known answer, its confidence by simulation, and what it must refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta, binom, norm
from torch import Tensor

from trivet.certify.policy_smoothing import PolicyCertificate, PolicySmoothing, mean_interval
from trivet.errors import BadValue
from trivet.methods import build, spec_of
from trivet.statistics import binomial_lower, gaussian_delta, gaussian_shift

TEN = tuple(map(float, range(1, 11)))


def proved(returns: Tensor, **settings: object) -> PolicyCertificate:
    given = {"thresholds": TEN, "sigma": 0.5, "episodes": len(returns), **settings}
    return PolicySmoothing(**given).certify(returns)  # type: ignore[arg-type]


def some(count: int = 300, seed: int = 0) -> Tensor:
    return torch.randint(0, 11, (count,), generator=torch.Generator().manual_seed(seed)).double()


def test_the_bounds_are_the_papers_formulas() -> None:
    """Written out with scipy's distributions: Clopper-Pearson over ten thresholds, summed."""
    returns, n = some(), 300
    counts = [int((returns >= k).sum()) for k in TEN]
    p = [beta.ppf(0.05 / 10, c, n - c + 1) for c in counts]
    for budget in (0.0, 0.1, 0.7):
        expected = sum(norm.cdf(norm.ppf(each) - budget / 0.5) for each in p)
        assert proved(returns).mean(budget) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(("bound", "sides"), [("dkw", 2), ("dkw_one_sided", 1)])
def test_the_band_is_the_empirical_one_lowered_everywhere(bound: str, sides: int) -> None:
    returns = torch.tensor([-1.0, 0.5, 0.5, 2.0] * 100)
    found = proved(returns, bound=bound, thresholds=(), r_min=-2.0)
    gap = math.sqrt(math.log(sides / 0.05) / 800)
    assert found.thresholds.tolist() == [-1.0, 0.5, 2.0]
    assert found.probabilities.tolist() == pytest.approx([1 - gap, 0.75 - gap, 0.25 - gap], rel=1e-9)
    expected = -2 + sum(w * norm.cdf(norm.ppf(p - gap) - 0.4) for w, p in ((1, 1), (1.5, 0.75), (1.5, 0.25)))
    assert found.mean(0.2) == pytest.approx(expected, rel=1e-8)


def test_a_game_that_is_won_or_lost_needs_one_bound() -> None:
    returns = torch.cat([torch.ones(90), torch.zeros(10)])
    found = proved(returns, thresholds=(1.0,))
    p = beta.ppf(0.05, 90, 11)
    assert found.mean(0.3) == pytest.approx(norm.cdf(norm.ppf(p) - 0.6), rel=1e-8)
    assert found.at_least(1.0, 0.3) == found.mean(0.3)


def test_what_always_happened_is_not_certain() -> None:
    """n successes prove (alpha / K)^(1/n); one could only be lost to an infinite quantile."""
    found = proved(torch.full((1000,), 10.0))
    assert found.probabilities.tolist() == pytest.approx([(0.05 / 10) ** (1 / 1000)] * 10)
    assert 9.9 < found.mean(0.0) < 10
    assert found.mean(1e3) == 0.0
    with pytest.raises(BadValue, match=r"probabilities must lie in \[0, 1\)"):
        replace(found, probabilities=torch.ones(10, dtype=torch.float64))
    with pytest.raises(BadValue, match="probabilities"):
        replace(found, probabilities=torch.full((10,), torch.nan))


def test_a_mean_is_shifted_by_the_least_return() -> None:
    shifted = proved(some() - 7, thresholds=tuple(k - 7 for k in TEN), r_min=-7.0)
    assert shifted.mean(0.3) == pytest.approx(proved(some()).mean(0.3) - 7)
    assert shifted.mean(1e4) == -7
    assert shifted.at_least(-7.0, 5.0) == 1.0


def test_a_threshold_between_two_of_the_grid_takes_the_higher_one() -> None:
    found = proved(some())
    assert found.at_least(3.5, 0.1) == found.at_least(4.0, 0.1) < found.at_least(3.0, 0.1)
    assert found.at_least(11.0, 0.0) == 0.0


@given(
    st.lists(st.integers(0, 10), min_size=1, max_size=60),
    st.floats(0.05, 3.0),
    st.floats(0.0, 2.0),
    st.floats(0.0, 2.0),
    st.sampled_from(["clopper_pearson", "dkw", "dkw_one_sided"]),
)
def test_more_budget_less_noise_or_more_looks_never_help(
    values: list[int], sigma: float, low: float, more: float, bound: str
) -> None:
    returns = torch.tensor(values, dtype=torch.float64)
    grid = TEN if bound == "clopper_pearson" else ()
    found = proved(returns, sigma=sigma, bound=bound, thresholds=grid)
    mean = found.mean(low)
    assert 0 <= found.mean(low + more) <= mean <= found.mean(0.0) <= float(returns.mean()) + 1e-9
    assert proved(returns, sigma=2 * sigma, bound=bound, thresholds=grid).mean(low) >= mean
    assert proved(returns, sigma=sigma, bound=bound, thresholds=grid, looks=3).mean(low) <= mean


# Tightness: games of one observation and of many, for which the best attack is known.


def exact(probability: float, sigma: float) -> PolicyCertificate:
    """The certificate of a game won with a known probability."""
    one = torch.ones(1, dtype=torch.float64)
    return PolicyCertificate(one, one.long(), probability * one, sigma, 0.0, 0.05, 1, ())


@pytest.mark.parametrize("budget", [0.0, 0.2, 1.5])
@pytest.mark.parametrize("distance", [-0.3, 0.4, 1.0])
def test_a_shift_of_the_only_observation_attains_the_bound(distance: float, budget: float) -> None:
    """Reward 1[o + n > c]: won with Phi((o - c) / sigma), and after the shift -B with Phi((o - B - c) / sigma)."""
    found = exact(norm.cdf(distance / 0.5), 0.5)
    assert found.mean(budget) == pytest.approx(norm.cdf((distance - budget) / 0.5), rel=1e-9)


def wins(shift: Callable[[int, Tensor], Tensor], episodes: int = 40_000) -> float:
    """The rate of sum_t w_t (d_t + n_t) > -0.3 over six steps, where d_t may depend on the noise of earlier ones."""
    source = torch.Generator().manual_seed(1)
    total = torch.zeros(episodes, dtype=torch.float64)
    for step in range(6):
        moved = shift(step, total)
        total = total + W[step] * (moved + SIGMA * torch.randn(episodes, generator=source, dtype=torch.float64))
    return float((total > -0.3).double().mean())


W = torch.tensor([0.1, 0.5, 0.2, 0.6, 0.3, 0.5], dtype=torch.float64)
W = W / W.norm()
SIGMA, BUDGET = 0.4, 0.3


def test_shifts_along_a_linear_game_attain_the_bound_and_adaptive_ones_do_not_beat_it() -> None:
    """With 40,000 episodes a rate is off by more than 5.5 of its deviations with probability below 1e-7."""
    bound = exact(norm.cdf(0.3 / SIGMA), SIGMA).mean(BUDGET)
    slack = 5.5 * math.sqrt(0.25 / 40_000)
    tail = W.flip(0).square().cumsum(0).flip(0).sqrt()  # what is left to influence from each step on

    class Adaptive:
        """Spends where the game is still open, as much as its own squared budget allows."""

        def __init__(self, near: float) -> None:
            self.near, self.left = near, torch.full((40_000,), BUDGET**2, dtype=torch.float64)

        def __call__(self, step: int, total: Tensor) -> Tensor:
            wanted = self.left.sqrt() * W[step] / tail[step]
            wanted = wanted.where((total + 0.3).abs() < self.near, 0.0)
            self.left = self.left - wanted.square()
            return -wanted

    assert wins(lambda step, _: -BUDGET * W[step]) == pytest.approx(bound, abs=slack)
    for near in (0.3, 0.6, 10.0):
        assert wins(Adaptive(near)) > bound - slack
    # A certificate for half the noise that is there would be broken by the plain shift: the check can fail.
    assert wins(lambda step, _: -BUDGET * W[step]) < exact(norm.cdf(0.3 / SIGMA), 2 * SIGMA).mean(BUDGET) - slack


def test_a_frame_that_is_noised_anew_m_times_costs_the_root_of_m() -> None:
    """An agent that averages m noisy copies of one frame: the plain bound is false of it, the charged one exact."""
    m, distance, budget = 5, 0.3, 0.2
    p = norm.cdf(math.sqrt(m) * distance / SIGMA)
    attacked = norm.cdf(math.sqrt(m) * (distance - budget) / SIGMA)
    assert attacked < exact(p, SIGMA).mean(budget) - 0.05
    assert attacked == pytest.approx(exact(p, SIGMA / math.sqrt(m)).mean(budget), rel=1e-9)
    assert proved(some(), looks=m).mean(budget) == pytest.approx(proved(some()).mean(math.sqrt(m) * budget))


def test_it_is_the_trade_off_function_of_gaussian_differential_privacy() -> None:
    """The best distinguisher of N(0, 1) and N(mu, 1) over all events gives delta(epsilon); steps add up in squares."""
    p = torch.linspace(1e-4, 1 - 1e-4, 4001, dtype=torch.float64).tolist()
    for mu, epsilon in ((0.5, 0.3), (1.0, 1.0)):
        best = max(each - math.exp(epsilon) * gaussian_shift(each, mu) for each in p)
        assert best == pytest.approx(gaussian_delta(epsilon, mu), abs=1e-6)
    along = [0.3, 0.4, 1.2]
    once = gaussian_shift(0.9, math.sqrt(sum(mu**2 for mu in along)))
    direction = torch.tensor(along, dtype=torch.float64) / 1.3
    # The likelihood ratio of three independent shifts is a test along their direction.
    assert once == pytest.approx(norm.cdf(norm.ppf(0.9) - float(direction @ torch.tensor(along, dtype=torch.float64))))


def test_events_decided_early_pay_only_for_what_was_seen() -> None:
    found, decided = proved(some()), tuple(range(10))
    p = found.probabilities.tolist()
    expected = sum(norm.cdf(norm.ppf(each) - 0.1 * math.sqrt(k) / 0.5) for each, k in zip(p, decided, strict=True))
    assert found.mean_per_step(0.1, decided) == pytest.approx(expected, rel=1e-9)
    assert found.mean_per_step(0.1, decided) > found.mean_per_step(0.1, [10] * 10)
    assert found.mean_per_step(0.1, [10] * 10) == pytest.approx(found.mean(0.1 * math.sqrt(10)))
    with pytest.raises(BadValue, match="decided_by must hold 10 numbers"):
        found.mean_per_step(0.1, [1])


# Confidence, over repeated draws of the episodes.

UNIFORM = torch.arange(1, 11, dtype=torch.float64).flip(0) / 11  # P(R >= k) of a uniform return in 0..10


def failures(settings: dict[str, object], repetitions: int = 1000) -> int:
    """How often some bound exceeds the truth, for 40 episodes with returns uniform in 0..10."""
    source = torch.Generator().manual_seed(5)
    wrong = 0
    for _ in range(repetitions):
        found = proved(torch.randint(0, 11, (40,), generator=source).double(), alpha=0.2, **settings)
        wrong += bool((found.probabilities > UNIFORM[found.thresholds.long() - 1]).any())
    return wrong


ALLOWED = int(binom.ppf(1 - 1e-7, 1000, 0.2))


@pytest.mark.parametrize("bound", ["clopper_pearson", "dkw", "dkw_one_sided"])
def test_all_bounds_hold_at_once_as_often_as_promised(bound: str) -> None:
    """Too many failures by chance: probability below 1e-7."""
    assert failures({"bound": bound, "thresholds": TEN if bound == "clopper_pearson" else ()}) <= ALLOWED


def test_bounds_without_the_union_bound_fail_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PolicySmoothing, "_lower", lambda _, count: binomial_lower(count, 40, 0.2))
    assert failures({}) > ALLOWED


def test_one_bound_at_its_full_level_is_nearly_used_up() -> None:
    """A single threshold fails almost alpha often: the bound is no weaker than it must be."""
    source, wrong = torch.Generator().manual_seed(2), 0
    for _ in range(1000):
        returns = (torch.rand(1000, generator=source) < 0.7).double()
        wrong += proved(returns, thresholds=(1.0,), alpha=0.2).mean(0.0) > 0.7
    assert 0.14 * 1000 < wrong <= ALLOWED


def test_an_interval_of_the_mean_covers_it_and_is_exact_for_one_value() -> None:
    low, high = mean_interval(torch.tensor([1.0] * 30 + [0.0] * 10), (1.0,))
    assert (low, high) == pytest.approx((beta.ppf(0.025, 30, 11), beta.ppf(0.975, 31, 10)))
    source, missed = torch.Generator().manual_seed(3), 0
    for _ in range(300):
        low, high = mean_interval(torch.randint(0, 11, (40,), generator=source), TEN, confidence=0.8)
        missed += not low <= 5.0 <= high
    assert missed <= binom.ppf(1 - 1e-7, 300, 0.2)
    low, high = mean_interval(torch.full((400,), 10.0), TEN)
    assert (low, high) == pytest.approx((10 * (0.05 / 20) ** (1 / 400), 10.0))
    for returns, values in ((torch.tensor([0.5]), (1.0,)), (torch.tensor([1.0]), (1.0, 1.0))):
        with pytest.raises(BadValue):
            mean_interval(returns, values)


# Refusals.


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sigma": 0.0}, "sigma=0.0 must be positive"),
        ({"sigma": math.inf}, "sigma=inf"),
        ({"sigma": math.nan}, "sigma=nan"),
        ({"r_min": -math.inf}, "r_min=-inf must be finite: a mean unbounded below has no bound"),
        ({"thresholds": (1.0, 1.0)}, "thresholds="),
        ({"thresholds": (0.0, 1.0)}, "above r_min=0"),
        ({"thresholds": ()}, "must be given for bound='clopper_pearson'"),
        ({"bound": "dkw"}, "left out for the others"),
        ({"bound": "dkw_one_sided", "thresholds": (), "alpha": 0.6}, "alpha=0.6 must be at most 0.5"),
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"looks": 0}, "looks=0"),
        ({"episodes": 0}, "episodes=0"),
        ({"bound": "normal"}, "bound='normal' must be one of"),
    ],
)
def test_settings_without_a_certificate_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(BadValue, match=words):
        PolicySmoothing(**{"sigma": 0.5, "thresholds": TEN, **settings})  # type: ignore[arg-type]


def test_episodes_that_void_the_confidence_are_refused() -> None:
    smoothing = PolicySmoothing(0.5, TEN, episodes=100)
    with pytest.raises(BadValue, match="stopping early"):
        smoothing.certify(some(99))
    with pytest.raises(BadValue, match="returns must be finite"):
        smoothing.certify(torch.full((100,), torch.nan))
    with pytest.raises(BadValue, match="r_min=0 must be the least possible return, but an episode returned -1"):
        smoothing.certify(torch.full((100,), -1.0))
    for budget in (-0.1, math.inf, math.nan):
        with pytest.raises(BadValue, match="budget="):
            smoothing.certify(some(100)).mean(budget)


def test_its_conditions_say_what_was_done_and_its_spec_makes_it_again() -> None:
    made = PolicySmoothing(0.25, TEN, looks=4)
    said = " ".join(made.certify(torch.full((10_000,), 3.0)).conditions)
    for words in ("N(0, 0.25^2)", "drawn 4 times", "10000 independent episodes", "probability at most 0.05"):
        assert words in said
    assert build("certify", spec_of(made)) == made
