"""The one-run audit (Steinke, Nasr & Jagielski, NeurIPS 2023): one training, many canaries, a bound on epsilon."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trivet.audit import canaries
from trivet.audit.canaries import Access, Kind, Planted
from trivet.audit.leak_finding import LeakFinding
from trivet.audit.leak_test import LeakTest, Trainer, at
from trivet.claims import PrivacyClaim
from trivet.data.dataset import Splits
from trivet.errors import require
from trivet.methods import method, spec_of
from trivet.randomness import derive_seed, generator
from trivet.statistics import gaussian_epsilon

_LARGEST = 36.0  # e^-36 is the last that float64 can tell from nothing beside 1


@method(
    title="One-run audit",
    paper="Steinke, Nasr & Jagielski, NeurIPS 2023",
    year=2023,
    legs="private",
    note="a lower bound on epsilon; finding nothing proves nothing",
)
@dataclass(frozen=True)
class OneRun(LeakTest):
    """Include each of m canaries by a fair coin of its own, train once, and guess the coins from the scores.

    The r / 2 canaries that score highest are guessed in, the r / 2 lowest out, and v guesses are right. If the
    training were (epsilon, delta)-private, v would exceed a Binomial(r, e^epsilon / (1 + e^epsilon)) only by what
    delta allows, see `one_run_p_value`. The bound is the largest epsilon this rejects at level 1 - confidence.

    Promised: if the training is (epsilon, delta)-private for one record, the bound exceeds epsilon with probability
    at most 1 - confidence over the coins and the training. r is fixed beforehand; several choices share the level
    (Bonferroni). It says nothing from above: a weak attack on a leaking model finds 0.

    Beside it stands the sharper test of Mahloujifar, Melis & Chaudhuri (2024), see `one_run_mu`. It refutes that the
    training is mu-Gaussian differentially private, and its epsilon holds only for mechanisms with a Gaussian's
    trade-off curve, as DP-SGD without sampling has, so it is never held against a claim.

    Attributes:
        canaries: m, in the slots of as many training records.
        kind: "mislabelled" images, or "dirac" gradients in a weight of their own, the strongest canary there is.
        access: "black_box" sees the finished model's outputs; "white_box" every update (mislabelled), or the finished
            weights (dirac).
        guesses: choices of r, even numbers; none given means a fifth of the canaries.
        delta: None for that of the claim.
    """

    canaries: int = 1000
    kind: Kind = "mislabelled"
    access: Access = "black_box"
    guesses: tuple[int, ...] = ()
    delta: float | None = None
    confidence: float = 0.95

    def __post_init__(self) -> None:
        canaries.check(self.kind, self.access)
        require(self.canaries >= 2, f"canaries={self.canaries} must be at least 2.")
        require(0 < self.confidence < 1, f"confidence={self.confidence} must lie strictly between 0 and 1.")
        require(self.delta is None or 0 <= self.delta < 1, f"delta={self.delta} must lie in [0, 1).")
        require(
            all(2 <= each <= self.canaries and each % 2 == 0 for each in self.guesses),
            f"guesses={list(self.guesses)} must be even numbers from 2 to the {self.canaries} canaries.",
        )

    def run(self, trainer: Trainer, data: Splits, *, seed: int, claimed: PrivacyClaim | None = None) -> LeakFinding:
        began = time.perf_counter()
        adjacency = claimed.adjacency if claimed is not None else "add_remove"
        coins = torch.rand(self.canaries, generator=generator(seed, "coins")) < 0.5
        planted = Planted(
            data.train,
            self.kind,
            coins,
            seed=derive_seed(seed, "one run"),
            adjacency=adjacency,
            watch=self.access == "white_box" and self.kind == "mislabelled",
        )
        model = trainer(planted.train, number=0, planting=planted)
        found = self.judge(planted.scores(trainer, model, 0), coins, at(claimed, self.delta, len(data.train)))
        return LeakFinding(
            label=f"one-run audit ({self.kind}, {canaries.seen(self.access)})",
            spec=spec_of(self),
            access=canaries.seen(self.access),
            trained=1,
            seconds=time.perf_counter() - began,
            canaries=self.kind,
            planted=self.canaries,
            guesses=found.guesses,
            right=found.right,
            lower=found.lower,
            delta=found.delta,
            confidence=self.confidence,
            gaussian_lower=found.gaussian_lower,
            claimed=None if claimed is None else claimed.value,
            notes=("a lower bound: a stronger attack can only raise it",),
        )

    def judge(self, scores: Tensor, included: Tensor, delta: float) -> OneRunBound:
        """The best bound over the choices of r, each at its share of the level, for canaries' scores [m]."""
        choices = self.guesses or (max(2, len(scores) // 10 * 2),)
        level = (1 - self.confidence) / len(choices)
        bounds = []
        for guesses in choices:
            right = right_guesses(scores, included, guesses)
            mu = one_run_mu(right, guesses, len(scores), level)
            bounds.append(
                OneRunBound(
                    one_run_epsilon(right, guesses, len(scores), delta, level),
                    delta,
                    guesses,
                    right,
                    gaussian_epsilon(mu, delta) if delta > 0 else None,
                )
            )
        return max(bounds, key=lambda bound: (bound.lower, bound.gaussian_lower or 0.0))


@dataclass(frozen=True)
class OneRunBound:
    """epsilon >= lower at delta, from `right` of `guesses`; `gaussian_lower` for Gaussian trade-off curves only."""

    lower: float
    delta: float
    guesses: int
    right: int
    gaussian_lower: float | None


def right_guesses(scores: Tensor, included: Tensor, guesses: int) -> int:
    """How many are right if the higher half of the guesses says "in", the lower half "out"; in between none is made."""
    order = scores.argsort(descending=True, stable=True)  # equal scores are ordered by place, not by coin
    half = guesses // 2
    return int(included[order[:half]].sum()) + int((~included[order[len(order) - half :]]).sum())


def one_run_p_value(right: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """The probability, at most, of `right` or more right guesses under (epsilon, delta)-privacy.

    With W ~ Binomial(r, e^epsilon / (1 + e^epsilon)), v right of r guesses and m canaries:

        P[W >= v] + 2 m delta max_{i = 1..v} P[v - i <= W < v] / i.
    """
    require(0 <= right <= guesses <= canaries, f"right={right} of {guesses} guesses of {canaries} is impossible.")
    if right == 0:
        return 1.0
    from scipy.special import betainc, gammaln, log_expit

    tail = float(betainc(right, guesses - right + 1, np.exp(log_expit(epsilon))))
    if delta == 0:
        return tail
    k = np.arange(right - 1, -1, -1)
    ways = gammaln(guesses + 1) - gammaln(k + 1) - gammaln(guesses - k + 1)
    just_below = np.cumsum(np.exp(ways + k * log_expit(epsilon) + (guesses - k) * log_expit(-epsilon)))
    worst = float((just_below / np.arange(1, right + 1)).max())
    return min(1.0, tail + 2 * canaries * delta * worst)


def one_run_epsilon(right: int, guesses: int, canaries: int, delta: float, level: float) -> float:
    """The largest epsilon that `right` of `guesses` refute at `level`, by bisection; 0 if none."""
    if one_run_p_value(right, guesses, canaries, 0.0, delta) >= level:
        return 0.0
    low, high = 0.0, _LARGEST
    for _ in range(60):
        middle = (low + high) / 2
        rejected = one_run_p_value(right, guesses, canaries, middle, delta) < level
        low, high = (middle, high) if rejected else (low, middle)
    return low


def one_run_mu(right: int, guesses: int, canaries: int, level: float) -> float:
    """The largest mu such that mu-Gaussian differential privacy is refuted at `level`; 0 if none.

    Mahloujifar, Melis & Chaudhuri 2024, algorithm 3 with the trade-off curve of mu-Gaussian privacy, whose inverse is
    f(r) = Phi(Phi^-1(r) - mu): from r = level v / m and h = level (n - v) / m, for i = v - 1, …, 0

        h' = max(h, f(r)),  r <- r + i / (n - i) (h' - h),  h <- h';  refuted if r + h > n / m.
    """
    require(0 <= right <= guesses <= canaries, f"right={right} of {guesses} guesses of {canaries} is impossible.")
    low, high = 0.0, 40.0
    if not _refuted(right, guesses, canaries, level, np.zeros(1))[0]:
        return 0.0
    for _ in range(5):  # each time all of 64 points at once: a bisection would walk the recursion ten times as often
        grid = np.linspace(low, high, 64)
        refuted = _refuted(right, guesses, canaries, level, grid)
        last = int(np.flatnonzero(refuted).max(initial=0))
        low, high = float(grid[last]), float(grid[min(last + 1, 63)])
    return low


def _refuted(right: int, guesses: int, canaries: int, level: float, mu: np.ndarray) -> np.ndarray:
    from scipy.special import ndtr, ndtri

    r = np.full_like(mu, level * right / canaries)
    h = np.full_like(mu, level * (guesses - right) / canaries)
    for i in range(right - 1, -1, -1):
        rest = np.maximum(h, ndtr(ndtri(np.minimum(r, 1.0)) - mu))
        r += i / (guesses - i) * (rest - h)
        h = rest
    refuted: np.ndarray = r + h > guesses / canaries
    return refuted
