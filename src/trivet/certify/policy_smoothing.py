"""Policy smoothing (Kumar, Levine & Feizi, ICLR 2022): a lower bound on an agent's mean return under attack.

The agent adds Gaussian noise to each observation before it sees it (`trivet.control` plays such episodes). What is
certified, and what must be deployed, is that noisy agent; and what is certified is its mean return, not each action.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor

from trivet.errors import require
from trivet.methods import method
from trivet.statistics import binomial_lower, binomial_upper, gaussian_shift

_SLACK = 1e-12
"""Taken off each probability bound: more than the errors of the special functions that compute with it."""


@dataclass(frozen=True, eq=False)
class PolicyCertificate:
    """What episodes without attack prove about episodes under every attack; all bounds hold at once.

    Attributes:
        thresholds: [K] float64, lambda_1 < ... < lambda_K, all above `r_min`.
        counts: [K] int64, how many of the `episodes` returned at least that.
        probabilities: [K] float64, simultaneous lower bounds on P(R >= lambda_k) without attack, each below 1.
        sigma: of the noise, already divided by what several looks at one observation cost.
        r_min: the least possible return.
        alpha: how likely any of the bounds may be wrong, over the draw of the episodes.
        episodes: how many were played.
        conditions: what must hold for the bounds to be true, one sentence each.

    Raises:
        BadValue: probabilities outside [0, 1), which no finite number of episodes can prove.
    """

    thresholds: Tensor
    counts: Tensor
    probabilities: Tensor
    sigma: float
    r_min: float
    alpha: float
    episodes: int
    conditions: tuple[str, ...]

    def __post_init__(self) -> None:
        # Written so that NaN, which compares false with everything, is refused too.
        require(
            bool(((self.probabilities >= 0) & (self.probabilities < 1)).all()),
            "probabilities must lie in [0, 1); at 1 the bound would be infinite.",
        )

    def at_least(self, threshold: float, budget: float) -> float:
        """A lower bound on P(R >= `threshold`) under every adversary of total l_2 budget `budget`.

        Phi(Phi^{-1}(p_k) - budget / sigma) at the least lambda_k that is not below `threshold`.
        """
        shift = self._shift(budget)
        if threshold <= self.r_min:
            return 1.0
        reached = (self.thresholds >= threshold).nonzero()
        return gaussian_shift(float(self.probabilities[reached[0]]), shift) if len(reached) else 0.0

    def mean(self, budget: float) -> float:
        """A lower bound on E[R] under every adaptive adversary of total l_2 budget `budget` per episode.

        r_min + sum_k (lambda_k - lambda_{k-1}) Phi(Phi^{-1}(p_k) - budget / sigma), lambda_0 = r_min.
        """
        return self._sum([self._shift(budget)] * len(self.thresholds))

    def mean_per_step(self, step_budget: float, decided_by: Sequence[int]) -> float:
        """The same against budgets for each step, ||d_t||_2 <= `step_budget`, by prefixes of the episode.

        {R >= lambda_k} is decided by the first `decided_by[k]` observations, so it costs step_budget sqrt of that.
        """
        require(
            len(decided_by) == len(self.thresholds) and all(number >= 0 for number in decided_by),
            f"decided_by must hold {len(self.thresholds)} numbers of observations, one for each threshold.",
        )
        return self._sum([self._shift(step_budget) * math.sqrt(number) for number in decided_by])

    def _shift(self, budget: float) -> float:
        require(0 <= budget < math.inf, f"budget={budget} must be finite and not negative.")
        return budget / self.sigma

    def _sum(self, shifts: Sequence[float]) -> float:
        below = [self.r_min, *self.thresholds.tolist()]
        kept = map(gaussian_shift, self.probabilities.tolist(), shifts)
        parts = [(high - low) * p for low, high, p in zip(below[:-1], below[1:], kept, strict=True)]
        return self.r_min + math.fsum(parts)


@method(
    title="Policy smoothing",
    paper="Kumar, Levine & Feizi, ICLR 2022",
    year=2022,
    legs="robust",
    note="takes returns of episodes; recipes reach it through the stage certify_policy",
)
@dataclass(frozen=True)
class PolicySmoothing:
    """E[R] >= r_min + sum_k (lambda_k - lambda_{k-1}) Phi(Phi^{-1}(p_k) - B / sigma) under every attack of budget B.

    The adversary knows policy, states, past noise and actions, and shows o_t + d_t with sum_t ||d_t||_2^2 <= B^2 in
    every episode; the agent sees o_t + d_t + n_t with n_t ~ N(0, sigma^2 I) drawn once for each step. A sequence of
    such shifts is (B / sigma)-Gaussian differentially private under adaptive composition, so adaptivity gains the
    adversary nothing, and the bound is tight: against the worst policy, shifting one observation by B attains it.

    p_k are simultaneous lower confidence bounds on P(R >= lambda_k) from `episodes` independent ones without attack:

        "clopper_pearson"   p_k = Beta^{-1}(alpha / K; c_k, n - c_k + 1), c_k = #{R >= lambda_k}    (Bonferroni)
        "dkw"               p(lambda) = #{R >= lambda} / n - sqrt(ln(2 / alpha) / (2 n)), at the returns that occurred
        "dkw_one_sided"     the same with ln(1 / alpha), enough for bounds from below (Massart 1990), alpha <= 1/2

    The published certificates use the first for CartPole, the second for Freeway, and the first with the single
    threshold 1 for games that are won or lost; n = 10,000 and alpha = 0.05. Near p = 1 the first is by far the
    tightest. No p_k is ever 1: an event that always happened has (alpha / K)^(1 / n).

    Attributes:
        sigma: standard deviation of each noise coordinate, in the units of the observations.
        thresholds: lambda_k, chosen before the episodes were played; for "dkw" none, it holds for all at once.
        r_min: the least return the environment can give; 0 where rewards are never negative.
        episodes: how many are played, chosen before; stopping early at a good moment would void the bound.
        alpha: how likely the whole certificate may be wrong.
        bound: which confidence bounds.
        looks: how often the agent draws fresh noise for one observation. Noise added after stacking m frames shows
            each frame m times, which is worth m times the squared budget: B counts as sqrt(m) B.
    """

    room: ClassVar[str] = "certify"
    sigma: float
    thresholds: tuple[float, ...] = ()
    r_min: float = 0.0
    episodes: int = 10_000
    alpha: float = 0.05
    bound: Literal["clopper_pearson", "dkw", "dkw_one_sided"] = "clopper_pearson"
    looks: int = 1

    def __post_init__(self) -> None:
        require(
            0 < self.sigma < math.inf,
            f"sigma={self.sigma} must be positive and finite: an agent without noise has no certificate.",
        )
        require(math.isfinite(self.r_min), f"r_min={self.r_min} must be finite: a mean unbounded below has no bound.")
        require(self.episodes >= 1, f"episodes={self.episodes} must be at least 1.")
        require(0 < self.alpha < 1, f"alpha={self.alpha} must lie strictly between 0 and 1.")
        require(self.looks >= 1, f"looks={self.looks} must be at least 1.")
        bounds = ("clopper_pearson", "dkw", "dkw_one_sided")
        require(self.bound in bounds, f"bound={self.bound!r} must be one of {', '.join(bounds)}.")
        require(
            self.bound != "dkw_one_sided" or self.alpha <= 0.5,
            f"alpha={self.alpha} must be at most 0.5 for bound='dkw_one_sided': the inequality is proved no further.",
        )
        grid = (self.r_min, *self.thresholds)
        require(
            all(math.isfinite(each) for each in grid) and all(a < b for a, b in pairwise(grid)),
            f"thresholds={list(self.thresholds)} must be finite, increasing and above r_min={self.r_min:g}.",
        )
        require(
            (len(self.thresholds) > 0) == (self.bound == "clopper_pearson"),
            f"thresholds={list(self.thresholds)} must be given for bound='clopper_pearson', where they are chosen "
            "before sampling, and left out for the others, which hold at every return.",
        )

    def certify(self, returns: Tensor) -> PolicyCertificate:
        """The certificate from the returns [n] of all the `episodes`, played without attack, independent of each other.

        Raises:
            BadValue: more or fewer returns than `episodes`, one that is not finite, or one below `r_min`.
        """
        require(
            returns.shape == (self.episodes,),
            f"returns must be [{self.episodes}], one for each of the episodes decided on before, got "
            f"{tuple(returns.shape)}; stopping early, or adding some, voids the confidence.",
        )
        values = returns.double()
        require(bool(values.isfinite().all()), "returns must be finite.")
        require(
            float(values.min()) >= self.r_min,
            f"r_min={self.r_min:g} must be the least possible return, but an episode returned {float(values.min()):g}.",
        )
        if self.bound == "clopper_pearson":
            thresholds = torch.tensor(self.thresholds, dtype=torch.float64)
        else:
            thresholds = values.unique()
            thresholds = thresholds[thresholds > self.r_min]
        counts = _reached(values, thresholds)
        bounds = torch.tensor([self._lower(count) for count in counts.tolist()], dtype=torch.float64)
        return PolicyCertificate(
            thresholds,
            counts,
            (bounds - _SLACK).clamp_(min=0.0),
            self.sigma / math.sqrt(self.looks),
            self.r_min,
            self.alpha,
            self.episodes,
            self._conditions(),
        )

    def _lower(self, count: int) -> float:
        if self.bound == "clopper_pearson":
            return binomial_lower(count, self.episodes, self.alpha / len(self.thresholds))
        sides = 2 if self.bound == "dkw" else 1
        return count / self.episodes - math.sqrt(math.log(sides / self.alpha) / (2 * self.episodes))

    def _conditions(self) -> tuple[str, ...]:
        looks = "once" if self.looks == 1 else f"{self.looks} times"
        return (
            f"about the smoothed agent: N(0, {self.sigma:g}^2) is added to every observation before anything, its "
            f"frame stack included, sees it, and drawn {looks} for each; deploy it so",
            "against every adversary that knows policy, states and past noise, and moves the observations of each "
            "episode by at most the budget in l_2 altogether, in the units of the observations",
            "not against changes of states, dynamics, actions or rewards, nor through inputs that carry no noise",
            f"in the same environment, with the same distribution of starts; no return is below {self.r_min:g}",
            f"about the mean over episodes, not about each; wrong with probability at most {self.alpha:g} over the "
            f"{self.episodes} independent episodes, which chose neither weights nor sigma nor thresholds",
            "in real arithmetic: rounding where noise meets observations is not covered",
        )


def mean_interval(
    returns: Tensor, values: Sequence[float], *, r_min: float = 0.0, confidence: float = 0.95
) -> tuple[float, float]:
    """Lower and upper confidence bound on the mean of `returns` [n], whose only possible values are r_min and `values`.

    E[R] = r_min + sum_k (v_k - v_{k-1}) P(R >= v_k), each probability in its Clopper-Pearson interval, all at once by
    Bonferroni: exact, unlike the normal interval, which fails where almost all episodes return the same.

    Raises:
        BadValue: a return that is none of the values, or values that do not increase from r_min.
    """
    grid = torch.tensor([r_min, *values], dtype=torch.float64)
    require(bool((grid.diff() > 0).all()), f"values={list(values)} must increase from r_min={r_min:g}.")
    require(0 < confidence < 1, f"confidence={confidence} must lie strictly between 0 and 1.")
    require(
        len(returns) > 0 and bool(torch.isin(returns.double(), grid).all()),
        "returns must be some of the possible values.",
    )
    tail = (1.0 - confidence) / (2 * len(values))
    counts, steps = _reached(returns.double(), grid[1:]).tolist(), grid.diff().tolist()
    low, high = (
        r_min + math.fsum(s * bound(c, len(returns), tail) for s, c in zip(steps, counts, strict=True))
        for bound in (binomial_lower, binomial_upper)
    )
    return low, high


def _reached(values: Tensor, thresholds: Tensor) -> Tensor:
    """[K] int64, how many of `values` are at least each threshold."""
    return len(values) - torch.searchsorted(values.sort().values, thresholds)
