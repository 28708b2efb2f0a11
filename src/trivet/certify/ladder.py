"""Is a probability above this threshold, and above the next? Tests in sequence that stop as soon as they know."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from trivet.errors import require
from trivet.statistics import binomial_lower

EARLY = 0.25
"""The share of alpha that pays for stopping early; the rest is for the last look."""

_SPACING = 2.0
"""From one alternative of a bet to the next, the samples it would need grow by this factor."""

_ROUNDING = 1e-9
"""Asked of the logarithm of a wealth beyond what wins: more than its sums in float64 can be off."""

_FIRST = 100
"""No alternative is made for fewer samples than this."""

_HOPELESS = 3.0
"""Given up once the samples to come would have to be this many standard deviations better than those seen."""


class _Bet(NamedTuple):
    """log of each alternative's share [J], and of what a success and a failure multiply it by."""

    share: Tensor
    success: Tensor
    failure: Tensor


@dataclass(frozen=True)
class Ladder:
    """Of a coin with P(success) = p, tossed at most `n` times: how many of the rising `thresholds` lie below p?

    Threshold i has a test of H_i: p <= q_i. After t tosses with S successes and F failures it looks at the wealth of
    a gambler who bet on a few alternatives a_ij > q_i at the odds of q_i,

        W_i(t) = sum_j w_j (a_ij / q_i)^S ((1 - a_ij) / (1 - q_i))^F,     sum_j w_j = 1,

    and rejects H_i once W_i >= 4 / alpha, or after all n tosses if S reaches the least count s with
    P(Bin(n, q_i) >= s) <= 3 alpha / 4. The answer is the largest i such that at one and the same look the tests
    1, …, i all reject.

    Why it may look after every toss: if p <= q_i, a toss multiplies each summand by
    p a / q + (1 - p) (1 - a) / (1 - q) <= 1 on average (linear and rising in p, and 1 at p = q), so W_i is a
    non-negative supermartingale from 1, and passes 4 / alpha at all with probability at most alpha / 4 (Ville 1939).
    With the last look, a true H_i is rejected with probability at most alpha. Why alpha is not divided among the
    thresholds: too large an answer must have rejected the first true hypothesis, which is one and the same whatever
    the tosses. Stopping for any other reason, giving up included, adds no error.

    Betting against the count is the confidence sequence of Waudby-Smith & Ramdas (JRSS B 2024), brought to randomized
    smoothing by Voracek (NeurIPS 2024); deciding about given radii in stages is Horvath et al. (ICLR 2022). The
    alternatives are those at which the bet wins after n, n / 2, n / 4, … tosses, and certainty.

    It gives up on the next threshold when the last look can hardly be passed: if the rest of the tosses would have to
    be better than those seen by more than 3 standard deviations (signed root of the likelihood ratio).

    Attributes:
        thresholds: rising, in (0, 1).
        n: tosses at most.
        alpha: how likely the answer may be too large.
    """

    thresholds: tuple[float, ...]
    n: int
    alpha: float

    def __post_init__(self) -> None:
        inside = all(0 < q < 1 for q in self.thresholds)
        rising = all(a < b for a, b in zip(self.thresholds, self.thresholds[1:], strict=False))
        require(len(self.thresholds) > 0 and inside and rising, "thresholds must be rising, each between 0 and 1.")

    @property
    def early(self) -> float:
        """The chance of error of rejecting before the last look."""
        return EARLY * self.alpha

    @cached_property
    def enough(self) -> Tensor:
        """[thresholds] int64: the least successes of n that pass the last look; n + 1 where none do."""
        return torch.tensor([least_successes(q, self.n, self.alpha - self.early) for q in self.thresholds])

    @cached_property
    def _bets(self) -> tuple[_Bet, ...]:
        bets = []
        for q in self.thresholds:
            a = torch.tensor(_alternatives(q, self.n, self.early), dtype=torch.float64)
            share = torch.full_like(a, -math.log(len(a)))
            bets.append(_Bet(share, a.log() - math.log(q), (-a).log1p() - math.log1p(-q)))
        return tuple(bets)

    def passed(self, successes: Tensor, tosses: Tensor) -> Tensor:
        """[N] int64: how many thresholds, from the lowest, are rejected by `successes` of `tosses`, [N] int64 each."""
        won, standing = torch.zeros_like(successes), torch.ones_like(successes, dtype=torch.bool)
        for bet, enough in zip(self._bets, self.enough, strict=True):
            s, f = successes[:, None].double(), (tosses - successes)[:, None].double()
            wealth = (bet.share + s * bet.success + f * bet.failure).logsumexp(1)
            last = (tosses == self.n) & (successes >= enough)
            standing = standing & ((wealth >= _ROUNDING - math.log(self.early)) | last)
            won = won + standing
        return won

    def decided(self, level: Tensor, successes: Tensor, tosses: Tensor) -> Tensor:
        """[N] bool: whether more tosses are out of place where `level` thresholds have been passed."""
        over = (level == len(self.thresholds)) | (tosses >= self.n)
        allowed = (self.n - self.enough)[level.clamp(max=len(self.thresholds) - 1)]  # failures at the last look
        failures, rest = tosses - successes, (self.n - tosses).clamp(min=1)
        left = allowed - failures
        seen, future = failures / tosses.clamp(min=1), left.clamp(min=0) / rest
        both = (allowed / self.n).double()
        statistic = 2 * (tosses * _divergence(seen, both) + rest * _divergence(future, both))
        return over | (left < 0) | ((seen > both) & (statistic > _HOPELESS**2))


def least_successes(threshold: float, n: int, alpha: float) -> int:
    """The least s with P(Bin(n, threshold) >= s) <= alpha: that certifies p > threshold. n + 1 if there is none."""
    low, high = 0, n + 1
    while low < high:
        middle = (low + high) // 2
        if binomial_lower(middle, n, alpha) > threshold:
            high = middle
        else:
            low = middle + 1
    return low


def _alternatives(threshold: float, n: int, alpha: float) -> list[float]:
    """Where bets against `threshold` win after n, n / 2, n / 4, … tosses, and almost certainty.

    A bet with one of J equal shares on alternative a, if a is true, wins after about ln(J / alpha) / KL(a || q).
    """
    count = 2
    while True:
        needed = math.log(count / alpha)
        fewest = max(_FIRST, needed / -math.log(threshold))
        sizes = [n / _SPACING**k for k in range(64) if n / _SPACING**k > fewest]
        if len(sizes) + 1 <= count:
            break
        count += 1
    return [1 - 1e-12] + [_above(threshold, needed / size) for size in sizes]


def _above(threshold: float, divergence: float) -> float:
    """The a > threshold with KL(a || threshold) = divergence, below -ln(threshold), by bisection."""
    low, high = threshold, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        if middle >= 1.0:
            break
        kl = middle * math.log(middle / threshold) + (1 - middle) * math.log((1 - middle) / (1 - threshold))
        low, high = (middle, high) if kl < divergence else (low, middle)
    return low


def _divergence(a: Tensor, b: Tensor) -> Tensor:
    """KL between coins of probabilities a and b."""
    a = a.double()
    return torch.xlogy(a, a / b) + torch.xlogy(1 - a, (1 - a) / (1 - b))
