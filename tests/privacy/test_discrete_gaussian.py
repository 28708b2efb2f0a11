"""The noise against its probabilities, its proof by brute force on small lattices, and the grid.

Coins come from the operating system, so tests on them are random: each rejects a correct sampler with probability
below 1e-6, and the wrong spread is shown to be rejected.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from trivet.errors import BadValue
from trivet.privacy import accounting
from trivet.privacy.discrete_gaussian import DiscreteGaussian, _bernoulli_exp, discrete_gaussian
from trivet.privacy.mechanism import Clip, Mechanism, Poisson

ALARM = 1e-6
GENERATOR = torch.Generator()


def probabilities(sigma: float, far: int) -> np.ndarray:
    weights = np.exp(-(np.arange(-far, far + 1.0) ** 2) / (2 * sigma * sigma))
    return weights / weights.sum()


def fits(draws: np.ndarray, sigma: float) -> bool:
    """Chi-squared over the integers that are expected often enough, the others pooled."""
    far = math.ceil(12 * sigma) + 2
    expected = probabilities(sigma, far) * draws.size
    counts = np.bincount(np.clip(draws, -far, far) + far, minlength=2 * far + 1)
    often = expected > 20
    pooled = [np.append(each[often], each[~often].sum()) for each in (counts, expected)]
    return bool(stats.chisquare(*pooled).pvalue > ALARM)


@pytest.mark.parametrize("sigma", [1, 2, 7])
def test_small_noise_has_the_probabilities_of_the_definition(sigma) -> None:
    draws = discrete_gaussian(sigma, 100_000)
    assert fits(draws, sigma)
    assert not fits(draws, 1.05 * sigma)
    assert not fits(draws, 0.95 * sigma)
    assert not fits(np.rint(np.random.default_rng(0).laplace(0, sigma / math.sqrt(2), 100_000)).astype(int), sigma)


def test_noise_on_a_fine_grid_is_gaussian() -> None:
    """Kolmogorov-Smirnov: a grid of 2^-20 standard deviations is far finer than 10^5 draws can see."""
    sigma = 2**20 + 12345
    draws = discrete_gaussian(sigma, 100_000) / sigma
    assert stats.kstest(draws, "norm").pvalue > ALARM
    assert stats.kstest(draws * 1.08, "norm").pvalue < ALARM
    assert stats.kstest(draws + 0.05, "norm").pvalue < ALARM
    assert draws.std() == pytest.approx(1.0, abs=5 / math.sqrt(2 * draws.size))


def test_draws_are_independent() -> None:
    """Correlations of neighbours, of signs and of sizes, each within 5.5 standard errors."""
    draws = discrete_gaussian(1000, 100_000).astype(float)
    for each in (draws, np.sign(draws), abs(draws)):
        assert abs(np.corrcoef(each[1:], each[:-1])[0, 1]) < 5.5 / math.sqrt(draws.size)
    assert abs(np.corrcoef(np.sign(draws), abs(draws))[0, 1]) < 5.5 / math.sqrt(draws.size)
    assert not np.array_equal(draws, discrete_gaussian(1000, 100_000))


@pytest.mark.parametrize(("numerator", "denominator"), [(0, 5), (1, 3), (1, 1), (7, 3), (2**40 + 1, 2**41)])
def test_coins_have_their_probability(numerator, denominator) -> None:
    heads = int(_bernoulli_exp(np.full(200_000, numerator), denominator).sum())
    probability = math.exp(-numerator / denominator)
    assert stats.binomtest(heads, 200_000, probability).pvalue > ALARM
    assert stats.binomtest(heads, 200_000, 0.9 * probability).pvalue < ALARM


@pytest.mark.parametrize("sigma", [0.7, 1.5, 4.0])
@pytest.mark.parametrize("shift", [(1, 0), (1, 1), (2, 1)])
@pytest.mark.parametrize("q", [0.01, 0.3, 1.0])
def test_the_stated_bound_holds_on_a_lattice_in_two_dimensions(sigma, shift, q) -> None:
    """Moments of both directions summed over the lattice, against the formula with z = sigma / ||shift||.

    At q = 1 it is an equality on the lattice, up to what the sum leaves out.
    """
    far = math.ceil(40 * sigma)
    log_p = np.log(np.maximum(probabilities(sigma, far), 1e-300))
    line = -(np.arange(-far, far + 1.0) ** 2) / (2 * sigma * sigma)
    line -= np.log(np.exp(line).sum())
    assert np.allclose(line[far - 3 : far + 4], log_p[far - 3 : far + 4])
    z = sigma / math.hypot(*shift)
    without = line[:, None] + line[None, :]
    with_record = np.roll(without, shift, (0, 1))
    inside = (slice(shift[0], None), slice(shift[1], None))
    mixture = np.logaddexp(math.log1p(-q) if q < 1 else -np.inf, math.log(q) + with_record - without) + without
    for a in (2.0, 3.0, 8.0):
        stated = accounting._sampled_moment(q, z, a) if q < 1 else a * (a - 1) / (2 * z * z)
        removing = np.log(np.exp(a * mixture + (1 - a) * without)[inside].sum())
        adding = np.log(np.exp(a * without + (1 - a) * mixture)[inside].sum())
        assert removing <= stated * (1 + 1e-9)
        assert adding <= stated * (1 + 1e-9)
        assert removing >= 0.5 * stated  # or the sum would have missed the mass


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.floats(1e-4, 1e4), st.integers(0, 2**32), st.sampled_from([0.1, 0.9, 1.003, 3]), st.sampled_from([4, 12, 20]))
def test_a_contribution_on_the_grid_is_never_longer_than_its_bound(std, seed, size, bits) -> None:
    noise = DiscreteGaussian(bits)
    drawn = torch.randn(50, generator=torch.Generator().manual_seed(seed))
    gradient = drawn / drawn.norm() * size * std
    parts = noise.on_grid([gradient[:20], gradient[20:]], std, bound=std)
    units = [int(k) for part in parts for k in part]
    assert math.sqrt(sum(k * k for k in units)) * noise.spacing(std) <= std  # in whole numbers of any size
    found = torch.cat(parts).double() * noise.spacing(std)
    assert (found.abs() <= gradient.double().abs()).all()
    if size < 1:
        assert (found - gradient.double()).abs().max() < noise.spacing(std)


def test_bad_floats_are_bounded_too() -> None:
    noise = DiscreteGaussian()
    (part,) = noise.on_grid([torch.tensor([math.inf, -math.inf, math.nan, 1.0])], 1.0, bound=1.0)
    assert part.double().norm() * noise.spacing(1.0) <= 1.0
    assert part[2] == 0


@pytest.mark.parametrize("std", [0.001, 1.0, 1.7, 300.0])
def test_the_output_lies_on_the_grid_with_the_right_spread(std) -> None:
    noise = DiscreteGaussian()
    total = [torch.full((20_000,), 5.3 * std), torch.zeros(3, 5)]
    found = noise.add(total, std, GENERATOR)
    assert [each.shape for each in found] == [each.shape for each in total]
    h = noise.spacing(std)
    assert std / 2**21 < h <= std / 2**20
    for each in found:
        assert ((each.double() / h) % 1 == 0).all()
    assert float(found[0].std()) == pytest.approx(std, rel=5 / math.sqrt(2 * 20_000))
    assert float(found[0].mean()) == pytest.approx(5.3 * std, abs=5 * std / math.sqrt(20_000))


def test_the_order_of_records_does_not_change_the_sum_by_a_bit() -> None:
    """Float sums of the same records do differ."""
    noise = DiscreteGaussian()
    records = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    records *= 10.0 ** torch.arange(-3, 2).repeat(100)[:, None]

    def exact(rows: torch.Tensor) -> torch.Tensor:
        summed = torch.zeros(64, dtype=torch.int64)
        for row in rows:
            summed += noise.on_grid([row], 1.0, bound=100.0)[0]
        return summed

    def floats(rows: torch.Tensor) -> torch.Tensor:
        summed = torch.zeros(64)
        for row in rows:
            summed += row
        return summed

    assert torch.equal(exact(records), exact(records.flip(0)))
    assert not torch.equal(floats(records), floats(records.flip(0)))


def test_low_precision_sums_get_their_noise_in_float32() -> None:
    (found,) = DiscreteGaussian().add([torch.full((20_000,), 1000.0, dtype=torch.bfloat16)], 0.5, GENERATOR)
    assert found.dtype == torch.float32
    assert float(found.std()) == pytest.approx(0.5, rel=5 / math.sqrt(2 * 20_000))


def test_the_generator_has_no_say() -> None:
    first, second = (DiscreteGaussian().add([torch.zeros(100)], 1.0, torch.Generator().manual_seed(7)) for _ in "ab")
    assert not torch.equal(first[0], second[0])


def test_the_accountant_is_told_which_noise_it_is() -> None:
    mechanism = Mechanism(Poisson(100, 0.1), Clip(1.0), DiscreteGaussian(), 1.5, 10.0)
    assert mechanism.event.noise == "discrete_gaussian"


def test_what_has_no_grid_is_refused() -> None:
    with pytest.raises(BadValue, match="bits=21"):
        DiscreteGaussian(21)
    with pytest.raises(BadValue, match=r"std=0\.0"):
        DiscreteGaussian().add([torch.zeros(3)], 0.0, GENERATOR)
    with pytest.raises(BadValue, match="sigma=0"):
        discrete_gaussian(0, 3)
