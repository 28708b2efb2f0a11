"""What a sequence of private steps spends: epsilon at a given delta, from above and from below, and the inverse.

Three kinds of steps, each by the best proof there is for it:

- Gaussian noise on all records, or on batches that are no Poisson samples: steps compose exactly into one Gaussian
  with mu^2 = sum of 1 / z^2 (Dong, Roth & Su 2022), whose epsilon has a closed form (Balle & Wang, ICML 2018).
- Gaussian noise on Poisson samples: the privacy loss distribution, composed by FFT on a grid, rounded against us
  (Doroshenko et al., PoPETs 2022, for the rounding). The dp-accounting library does it.
- Discrete Gaussian noise: Rényi divergence. See `DiscreteGaussian` for the proof; no privacy loss distribution is
  proved for it in many dimensions.

The central-limit accountant ("GDP accountant"), which can state less than is spent, is not here at all; the limit
serves to guess where a search begins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from trivet.data.extras import extra
from trivet.errors import require
from trivet.privacy.mechanism import Event
from trivet.statistics import gaussian_delta, gaussian_epsilon, gaussian_mu

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

Spent = Iterable[tuple[Event, int]]
"""Events, and in how many steps each happened to the same records, in any order, each chosen in view of the last."""

_AGREED = 0.005  # two grids that differ by less, relatively, are fine enough
_ROUNDING = 1e-13  # what floating-point convolutions of a million points were seen to add to delta
_LEAST_DELTA = 1e3 * _ROUNDING
_LEAST_NOISE = 0.01  # on samples; one step with less costs an epsilon of some 5000, which is called infinite
_PER_STEP = 2**18  # most grid points of the loss of one step ...
_IN_ALL = 2**20  # ... and of all of them together: about a second


@dataclass(frozen=True)
class Account:
    """What was spent.

    Attributes:
        epsilon: proved to hold, at `delta`; inf where nothing is protected.
        lower: no proof can state less than this for the worst case of these events; 0 where it was not computed.
        rdp: the bound by Rényi divergence, a second and independent computation; inf where it was not computed.
        grid: spacing of the privacy losses that `epsilon` was computed on; 0 for a closed form.
        accountant: by which method and version.
    """

    epsilon: float
    delta: float
    lower: float
    rdp: float
    grid: float
    accountant: str


def account(spent: Spent, delta: float, refine: bool = True) -> Account:
    """The privacy that `spent` costs each record.

    Without `refine` it takes the first grid, some tenths of a per cent above the best, and skips `lower` and `rdp`.

    Raises:
        BadValue: delta outside (0, 1), or events whose guarantees are about different neighbours.
        TrivetError: dp-accounting is needed and not installed.
    """
    _proper(delta)
    return _account(_merged(spent), delta, refine)


def delta_for(spent: Spent, epsilon: float) -> float:
    """The delta at which `spent` costs `epsilon`.

    Raises:
        BadValue: a negative epsilon, or discrete noise, which is accounted from delta to epsilon alone.
    """
    require(epsilon >= 0, f"epsilon={epsilon} must not be negative.")
    total = _merged(spent)
    require(not total.discrete, "noise='discrete_gaussian' must be accounted for at a given delta: use account.")
    if total.empty:
        return 0.0
    if math.isinf(total.mu):
        return 1.0
    if not total.sampled:
        return gaussian_delta(epsilon, total.mu)
    found, _ = _refined(total, lambda pld: float(pld.get_delta_for_epsilon(epsilon)))
    return min(found, 1.0)


@lru_cache(maxsize=256)
def noise_for(event: Event, steps: int, epsilon: float, delta: float) -> float:
    """The least noise multiplier, to about 1e-3, with which `steps` events like `event` cost at most `epsilon`.

    `account` of the result never exceeds `epsilon`. The noise multiplier of `event` itself is not looked at.

    Raises:
        BadValue: a target that is not positive, or no steps to calibrate.
    """
    require(0 < epsilon < math.inf, f"epsilon={epsilon} must be positive and finite.")
    require(steps >= 1, f"steps={steps} must be at least 1.")
    _proper(delta)

    def spends(z: float, refine: bool = False) -> float:
        return account([(replace(event, noise_multiplier=z), steps)], delta, refine).epsilon

    low, high = _bracket(spends, epsilon, _guess(event, steps, epsilon, delta))
    while high / low > 1.0005:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if spends(middle) <= epsilon else (middle, high)
    while spends(high, refine=True) > epsilon:  # not so by construction: finer grids only add bounds to choose from
        high *= 1.001
    return high


def shuffled_lower_bound(noise_multiplier: float, steps: int, delta: float) -> float:
    """At least this epsilon is spent by one pass of `steps` shuffled batches (Chua et al., ICML 2024, section 4).

    For any c: delta(eps) >= P(A_c) - e^eps Q(A_c), where A_c is the event that some step's output exceeds c,
    P(A_c) = 1 - Phi((c - 2) / z) Phi(c / z)^(steps - 1) and Q(A_c) = 1 - Phi((c - 1) / z) Phi(c / z)^(steps - 1).
    Far above what Poisson samples of the same rate cost, it is why shuffled batches are accounted without
    amplification.
    """
    import numpy as np
    from scipy.special import log_ndtr

    require(noise_multiplier > 0, f"noise_multiplier={noise_multiplier} must be positive.")
    require(steps >= 1, f"steps={steps} must be at least 1.")
    _proper(delta)
    c = np.linspace(-2.0, 3.0 + 12.0 * noise_multiplier, 200_001)
    others = (steps - 1) * log_ndtr(c / noise_multiplier)
    with_record = -np.expm1(log_ndtr((c - 2) / noise_multiplier) + others)
    without = -np.expm1(log_ndtr((c - 1) / noise_multiplier) + others)
    telling = (with_record > delta) & (without > 1e-14)  # below, 1 - Phi is rounding
    if not telling.any():
        return 0.0
    return max(0.0, float(np.log((with_record[telling] - delta) / without[telling]).max()))


def _proper(delta: float) -> None:
    require(0 < delta < 1, f"delta={delta} must lie strictly between 0 and 1.")


@dataclass(frozen=True)
class _Total:
    """Equal events taken together.

    Attributes:
        mu: of the one Gaussian that all steps without amplification make; inf for one without noise.
        sampled: (rate, noise multiplier, steps) of Gaussian noise on Poisson samples.
        discrete: whether any noise was discrete; then only Rényi divergences bound it.
    """

    mu: float
    sampled: tuple[tuple[float, float, int], ...]
    discrete: bool

    @property
    def empty(self) -> bool:
        return self.mu == 0 and not self.sampled


def _merged(spent: Spent) -> _Total:
    squared, sampled, discrete = 0.0, dict[tuple[float, float], int](), False
    adjacencies = set()
    for event, steps in spent:
        require(steps >= 0, f"steps={steps} must not be negative.")
        if not steps:
            continue
        adjacencies.add(event.adjacency)
        discrete |= event.noise == "discrete_gaussian"
        z = event.noise_multiplier
        amplified = event.sampler == "poisson" and event.rate < 1
        if z < (_LEAST_NOISE if amplified else 1e-100):
            squared = math.inf
        elif not amplified:
            squared += (steps if event.sampler == "poisson" else _passes(event.rate, steps)) / z**2
        else:
            sampled[event.rate, z] = sampled.get((event.rate, z), 0) + steps
    require(
        len(adjacencies) <= 1,
        f"adjacency={' and '.join(sorted(adjacencies))} must be one: guarantees about different neighbours do not add.",
    )
    return _Total(math.sqrt(squared), tuple((q, z, steps) for (q, z), steps in sorted(sampled.items())), discrete)


def _passes(rate: float, steps: int) -> int:
    """In how many of `steps` shuffled batches a record can have been: once in each pass, begun or complete."""
    per_pass = round(1 / rate)
    require(
        abs(1 / rate - per_pass) < 1e-6 * per_pass,
        f"rate={rate} must be one over a whole number of steps where batches are shuffled.",
    )
    return -(-steps // per_pass)


@lru_cache(maxsize=1024)
def _account(total: _Total, delta: float, refine: bool) -> Account:
    if total.empty:
        return Account(0.0, delta, 0.0, 0.0, 0.0, "nothing was spent")
    if math.isinf(total.mu):
        return Account(math.inf, delta, 0.0, math.inf, 0.0, "no noise to speak of, no privacy")
    if total.discrete:
        rdp = _renyi(total, delta)
        return Account(rdp, delta, 0.0, rdp, 0.0, "rdp of the discrete Gaussian")
    if not total.sampled:
        exact = gaussian_epsilon(total.mu, delta)
        return Account(exact, delta, exact * (1 - 1e-9), _renyi(total, delta), 0.0, "gaussian, closed form")
    require(
        delta >= _LEAST_DELTA,
        f"delta={delta} must be at least {_LEAST_DELTA:.0e}: less drowns in the rounding of the accountant.",
    )
    named = f"pld, dp-accounting {_version()}"
    if not refine:
        grid = _first_grid(total)
        return Account(_epsilon_on(total, delta, grid), delta, 0.0, math.inf, grid, named)
    epsilon, grid = _refined(total, lambda pld: float(pld.get_epsilon_for_delta(delta)))
    return Account(epsilon, delta, _lower(total, delta, epsilon), _renyi(total, delta), grid, named)


# Privacy loss distributions.


def _distribution(total: _Total, grid: float, pessimistic: bool = True) -> PrivacyLossDistribution:
    """Of everything in `total`. The sharper rounding, "connect the dots", exists in one direction alone."""
    with extra("private", "accounting for Poisson samples needs dp-accounting"):
        from dp_accounting.pld import privacy_loss_distribution as library

    def of(standard_deviation: float, rate: float, steps: int) -> PrivacyLossDistribution:
        one = library.from_gaussian_mechanism(
            standard_deviation,
            sampling_prob=rate,
            value_discretization_interval=grid,
            pessimistic_estimate=pessimistic,
            use_connect_dots=pessimistic,
        )
        return one.self_compose(steps) if steps > 1 else one

    parts = [of(z, q, steps) for q, z, steps in total.sampled]
    if total.mu:
        parts.append(of(1 / total.mu, 1.0, 1))
    composed = parts[0]
    for part in parts[1:]:
        composed = composed.compose(part)
    return composed


def _spread(total: _Total) -> tuple[float, int]:
    """About the variance of the summed privacy losses, and the number of steps that add to it."""
    variance, steps = total.mu**2, int(total.mu > 0)
    for q, z, count in total.sampled:
        variance += count * min(q * q * math.expm1(min(1 / z**2, 700.0)), 1 / z**2)
        steps += count
    return variance, steps


def _first_grid(total: _Total) -> float:
    """Rounding adds grid^2 / 6 at most to the variance of a step's loss: at an eighth of its root, a quarter of 1 %."""
    variance, steps = _spread(total)
    return max(math.sqrt(variance / steps) / 8, _finest(total))


def _finest(total: _Total) -> float:
    """The least grid whose work is bearable. Grids below it give no better bounds, only rounding errors."""
    widest = max(
        (math.log1p(q * math.expm1(min(10 / z + 0.5 / z**2, 700.0))) for q, z, _ in total.sampled), default=0.0
    )
    return max(2 * widest / _PER_STEP, 20 * math.sqrt(_spread(total)[0]) / _IN_ALL)


def _refined(total: _Total, measure: Callable[[PrivacyLossDistribution], float]) -> tuple[float, float]:
    """The least of a pessimistic `measure` over ever finer grids, and its grid. On every grid it is a bound."""
    grid = _first_grid(total)
    last = measure(_distribution(total, grid))
    best, at = last, grid
    while grid / 2 >= _finest(total):
        grid /= 2
        found = measure(_distribution(total, grid))
        if found < best:
            best, at = found, grid
        if abs(last - found) <= _AGREED * found:
            break
        last = found
    return best, at


def _epsilon_on(total: _Total, delta: float, grid: float, pessimistic: bool = True) -> float:
    return float(_distribution(total, grid, pessimistic).get_epsilon_for_delta(delta))


def _lower(total: _Total, delta: float, epsilon: float) -> float:
    """Rounded in our favour: half a grid too little in every step. So the grid is 2 % of epsilon over the steps."""
    _, steps = _spread(total)
    grid = max(0.04 * epsilon / steps, _finest(total))
    return min(_epsilon_on(total, delta + _ROUNDING, grid, pessimistic=False), epsilon) if epsilon else 0.0


# Rényi divergence.


def _renyi(total: _Total, delta: float) -> float:
    """min over orders a of D_a + ln((a - 1) / a) - (ln delta + ln a) / (a - 1) (Canonne, Kamath & Steinke 2020)."""
    import numpy as np

    whole = np.unique(np.concatenate([np.arange(2, 65), np.round(64 * 1.12 ** np.arange(34))]))
    between = np.concatenate([1 + np.geomspace(1e-3, 1, 90)[:-1], np.arange(2.05, 12, 0.05), np.arange(12.5, 32)])
    orders = np.unique(np.concatenate([whole, between]))
    if not total.sampled:
        moments = orders * (orders - 1) * total.mu**2 / 2
    elif total.discrete:
        # Proved for whole orders. (a - 1) D_a is convex in a, so chords bound it from above.
        moments = np.interp(orders, [1.0, *whole], [0.0, *(_log_moment(total, float(a)) for a in whole)])
    else:
        moments = np.array([_log_moment(total, float(a)) for a in orders])
    divergences = moments / (orders - 1)
    found = divergences + np.log1p(-1 / orders) - (math.log(delta) + np.log(orders)) / (orders - 1)
    return max(0.0, float(found.min()))


def _log_moment(total: _Total, a: float) -> float:
    """(a - 1) D_a of everything: steps add."""
    moment = _sampled_moment if a == round(a) else _sampled_moment_between
    gaussian = a * (a - 1) * total.mu**2 / 2
    return gaussian + sum(steps * moment(q, z, a) for q, z, steps in total.sampled)


def _sampled_moment(q: float, z: float, a: float) -> float:
    """log sum_i C(a, i) (1 - q)^(a - i) q^i exp((i^2 - i) / (2 z^2)), whole a (Mironov, Talwar & Zhang 2019)."""
    import numpy as np
    from scipy.special import gammaln, logsumexp

    i = np.arange(int(a) + 1)
    choices = gammaln(a + 1) - gammaln(i + 1) - gammaln(a - i + 1)
    return float(logsumexp(choices + (a - i) * math.log1p(-q) + i * math.log(q) + (i * i - i) / (2 * z * z)))


def _sampled_moment_between(q: float, z: float, a: float) -> float:
    """log E (1 - q + q exp(x / z - 1 / (2 z^2)))^a over x ~ N(0, 1), by the trapezoid rule.

    The integrand is analytic in a strip of half-width pi z, so that the rule's error is of order e^(-2 pi^2 z / step).
    """
    import numpy as np
    from scipy.special import logsumexp

    step = min(0.1, z / 4)
    x = np.arange(-40.0, a / z + 40.0, step)
    mixture = np.logaddexp(math.log1p(-q), math.log(q) + x / z - 0.5 / z**2)
    return float(logsumexp(a * mixture - x * x / 2)) + math.log(step / math.sqrt(2 * math.pi))


# The search for a noise multiplier.


def _guess(event: Event, steps: int, epsilon: float, delta: float) -> float:
    """Where the limit of many steps (Bu et al. 2020) would have the answer: a place to begin, never an answer."""
    mu = gaussian_mu(epsilon, delta)
    if event.sampler == "shuffled":
        return math.sqrt(_passes(event.rate, steps)) / mu
    return 1 / math.sqrt(math.log1p((mu / event.rate) ** 2 / steps))


def _bracket(spends: Callable[[float], float], epsilon: float, guess: float) -> tuple[float, float]:
    """(low, high) noise multipliers near `guess` of which `low` spends more than `epsilon`, and `high` does not."""
    high, factor = guess, 1.1
    while spends(high) > epsilon:
        high *= factor
        factor **= 1.5
    low, factor = high / 1.1, 1.1
    while spends(low) <= epsilon:
        high, low, factor = low, low / factor, factor**1.5
        require(low > _LEAST_NOISE, f"epsilon={epsilon} is met almost without noise: state noise_multiplier instead.")
    return low, high


def _version() -> str:
    from importlib.metadata import version

    return version("dp-accounting")
