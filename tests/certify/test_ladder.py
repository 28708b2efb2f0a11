"""The sequence of tests: its error exactly and in simulation, its wealth as a martingale, and what early stops cost."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from torch import Tensor

from trivet.certify.ladder import Ladder, least_successes
from trivet.errors import BadValue
from trivet.statistics import binomial_lower


def chance_of_passing(ladder: Ladder, number: int, p: float) -> float:
    """The exact probability that thresholds 1..number are ever passed, at looks after each of n tosses of coin p."""
    alive, passed = np.array([1.0]), 0.0  # the probability of each count of successes, never yet passed
    for toss in range(1, ladder.n + 1):
        alive = np.append(alive * (1 - p), 0.0) + np.append(0.0, alive * p)
        successes = torch.arange(toss + 1)
        there = (ladder.passed(successes, torch.full_like(successes, toss)) >= number).numpy()
        passed += alive[there].sum()
        alive[there] = 0.0
    return float(passed)


@pytest.mark.parametrize("alpha", [0.05, 0.001])
@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.97])
def test_a_true_hypothesis_is_rejected_with_probability_below_alpha_exactly(threshold: float, alpha: float) -> None:
    ladder = Ladder((threshold,), 400, alpha)
    at_the_edge = chance_of_passing(ladder, 1, threshold)
    assert 0.3 * alpha < at_the_edge <= alpha
    assert chance_of_passing(ladder, 1, threshold - 0.02) < at_the_edge


def test_more_thresholds_below_do_not_raise_the_chance_of_error() -> None:
    alone = chance_of_passing(Ladder((0.8,), 300, 0.05), 1, 0.8)
    among = chance_of_passing(Ladder((0.5, 0.6, 0.7, 0.75, 0.8, 0.9), 300, 0.05), 5, 0.8)
    assert 0.5 * alone < among <= alone <= 0.05


class Peeking(Ladder):
    """Looks at a bound for one look after every toss, as if it were the only one."""

    def passed(self, successes: Tensor, tosses: Tensor) -> Tensor:
        table = [
            [binomial_lower(s, n, self.alpha) > q for q in self.thresholds]
            for s, n in zip(successes.tolist(), tosses.tolist(), strict=True)
        ]
        return torch.tensor(table).sum(1)


def test_peeking_at_the_bound_for_one_look_is_caught() -> None:
    assert chance_of_passing(Peeking((0.5,), 100, 0.05), 1, 0.5) > 2 * 0.05
    assert chance_of_passing(Ladder((0.5,), 100, 0.05), 1, 0.5) <= 0.05


def runs(ladder: Ladder, p: float, repetitions: int, block: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The answers and the tosses taken of `repetitions` coins, looked at after every `block`."""
    draw = np.random.default_rng(seed)
    successes, tosses = (torch.zeros(repetitions, dtype=torch.int64) for _ in range(2))
    level, open_ = torch.zeros_like(tosses), torch.ones(repetitions, dtype=torch.bool)
    while bool(open_.any()):
        rows = open_.nonzero().flatten()
        successes[rows] += torch.from_numpy(draw.binomial(block, p, len(rows)))
        tosses[rows] += block
        level[rows] = level[rows].maximum(ladder.passed(successes[rows], tosses[rows]))
        open_[rows] = ~ladder.decided(level[rows], successes[rows], tosses[rows])
    return level, tosses


@pytest.mark.parametrize(("p", "true"), [(0.5, 0), (0.9, 2), (0.99, 3)])
def test_in_ten_thousand_runs_too_large_an_answer_is_as_rare_as_promised(p: float, true: int) -> None:
    """p is itself a threshold, the worst case; a sound ladder fails this for one seed in a million."""
    level, _ = runs(Ladder((0.5, 0.8, 0.9, 0.99), 2_000, 0.05), p, 10_000, 20)
    false = int((level > true).sum())
    assert 0 < false <= binom.isf(1e-6, 10_000, 0.05)


def test_the_wealth_is_a_fair_game_at_the_threshold_and_a_losing_one_below() -> None:
    ladder = Ladder((0.7,), 5_000, 0.01)
    (bet,) = ladder._bets
    for tosses in (1, 7, 60):
        s = torch.arange(tosses + 1).double()[:, None]
        wealth = (bet.share + s * bet.success + (tosses - s) * bet.failure).logsumexp(1).exp()
        for p, fair in ((0.7, True), (0.6, False)):
            mean = float((torch.from_numpy(binom.pmf(np.arange(tosses + 1), tosses, p)) * wealth).sum())
            assert mean == pytest.approx(1.0, rel=1e-9) if fair else mean < 1.0


@settings(deadline=None, max_examples=60)
@given(st.floats(0.5, 0.9995), st.integers(50, 3_000), st.floats(0.001, 0.2))
def test_the_least_successes_are_those_of_the_exact_binomial_test(threshold: float, n: int, alpha: float) -> None:
    least = least_successes(threshold, n, alpha)
    assert least == n + 1 or binom.sf(least - 1, n, threshold) <= alpha * (1 + 1e-9)
    assert binom.sf(least - 2, n, threshold) > alpha * (1 - 1e-9)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 2_000), st.floats(0, 1))
def test_more_successes_never_lower_the_answer(tosses: int, share: float) -> None:
    ladder = Ladder((0.5, 0.8, 0.9, 0.99), 2_000, 0.01)
    successes = torch.tensor([int(share * (tosses - 1)), int(share * (tosses - 1)) + 1])
    few, more = ladder.passed(successes, torch.tensor([tosses, tosses])).tolist()
    assert few <= more


def test_it_answers_as_all_tosses_would_with_a_fraction_of_them() -> None:
    """Of coins well between the thresholds nothing may be lost; 6 sigma of 300 runs is a false alarm below 1e-8."""
    ladder = Ladder((0.5, 0.8, 0.9, 0.99), 20_000, 0.001)
    for p, expected in ((0.3, 0), (0.7, 1), (0.85, 2), (0.95, 3), (0.999, 4)):
        level, tosses = runs(ladder, p, 300, 100)
        assert int((level == expected).sum()) >= 297  # each is lost with probability well below 1e-3
        assert float(tosses.double().mean()) < ladder.n / 5


def test_an_input_is_decided_at_the_top_at_the_end_and_when_there_is_no_hope() -> None:
    ladder = Ladder((0.5, 0.9), 1_000, 0.01)

    def decided(level: int, successes: int, tosses: int) -> bool:
        return bool(ladder.decided(*(torch.tensor([value]) for value in (level, successes, tosses))))

    assert not decided(0, 0, 0)
    assert decided(2, 200, 200)
    assert decided(1, 850, 1_000)
    assert decided(0, 20, 100)
    assert not decided(1, 88, 100)
    assert decided(1, 500, 650)  # 150 failures, and at most 80 or so pass


@pytest.mark.parametrize("thresholds", [(), (0.5, 0.5), (0.9, 0.5), (0.0,), (1.0,), (math.nan,)])
def test_thresholds_that_do_not_rise_inside_the_unit_interval_are_refused(thresholds: tuple[float, ...]) -> None:
    with pytest.raises(BadValue, match="thresholds must be rising"):
        Ladder(thresholds, 100, 0.05)
