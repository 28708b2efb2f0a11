"""The many-run audit (Jagielski, Ullman & Oprea, NeurIPS 2020; Nasr et al., S&P 2021): train again and again."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from trivet import display
from trivet.audit import canaries
from trivet.audit.canaries import Access, Kind, Planted
from trivet.audit.leak_finding import LeakFinding
from trivet.audit.leak_test import LeakTest, Trainer, at
from trivet.claims import PrivacyClaim
from trivet.data.dataset import Splits
from trivet.errors import require
from trivet.methods import method, spec_of
from trivet.randomness import derive_seed
from trivet.statistics import binomial_upper, gaussian_epsilon, normal_quantile


@method(
    title="Many-run audit",
    paper="Jagielski, Ullman & Oprea, NeurIPS 2020; Nasr et al., S&P 2021",
    year=2021,
    legs="private",
    note="a lower bound on epsilon; finding nothing proves nothing",
)
@dataclass(frozen=True)
class ManyRun(LeakTest):
    """Train `runs` models with a canary and as many without, and tell them apart by a threshold on its score.

    One half of the models chooses the threshold, the other counts the errors, see `many_run_bound`.

    Promised: if the training is (epsilon, delta)-private for one record, the bound exceeds epsilon with probability
    at most 1 - confidence. It cannot exceed what so many runs can show: 500 and 500 counted without an error give
    4.91 at 95 %. It says nothing from above.

    Attributes:
        runs: with the canary, and again as many without.
        kind, access: of the canary, as in the one-run audit.
        delta: None for that of the claim.
    """

    runs: int = 200
    kind: Kind = "mislabelled"
    access: Access = "black_box"
    delta: float | None = None
    confidence: float = 0.95

    def __post_init__(self) -> None:
        canaries.check(self.kind, self.access)
        require(self.runs >= 4, f"runs={self.runs} must be at least 4: half of them choose the threshold.")
        require(0 < self.confidence < 1, f"confidence={self.confidence} must lie strictly between 0 and 1.")
        require(self.delta is None or 0 <= self.delta < 1, f"delta={self.delta} must lie in [0, 1).")

    def run(self, trainer: Trainer, data: Splits, *, seed: int, claimed: PrivacyClaim | None = None) -> LeakFinding:
        began = time.perf_counter()
        adjacency = claimed.adjacency if claimed is not None else "add_remove"

        def release(with_canary: bool, number: int) -> float:
            planted = Planted(
                data.train,
                self.kind,
                torch.tensor([with_canary]),
                seed=derive_seed(seed, "many runs"),  # always the same canary
                adjacency=adjacency,
                watch=self.access == "white_box" and self.kind == "mislabelled",
            )
            model = trainer(planted.train, number=number, planting=planted)
            return float(planted.scores(trainer, model, number))

        inside, outside = scores_of(release, self.runs)
        delta = at(claimed, self.delta, len(data.train))
        found = many_run_bound(inside, outside, delta, self.confidence)
        return LeakFinding(
            label=f"many-run audit ({self.kind}, {canaries.seen(self.access)})",
            spec=spec_of(self),
            access=canaries.seen(self.access),
            trained=2 * self.runs,
            seconds=time.perf_counter() - began,
            canaries=self.kind,
            planted=1,
            guesses=found.with_canary + found.without,
            right=found.hits + found.without - found.false_alarms,
            lower=found.lower,
            delta=delta,
            confidence=self.confidence,
            gaussian_lower=found.gaussian_lower,
            claimed=None if claimed is None else claimed.value,
            notes=(
                "a lower bound: a stronger attack can only raise it, and with so many runs not above "
                f"{found.ceiling:.2f}",
            ),
        )


Release = Callable[[bool, int], float]
"""`release(with_canary, run)`: run a mechanism once, with fresh noise, on data with or without the canary; a score of
what it released that tends to be larger with it. Runs are numbered, those without after those with."""


@dataclass(frozen=True)
class ManyRunBound:
    """epsilon >= lower: what the counted half of the runs showed.

    Attributes:
        gaussian_lower: for mechanisms with a Gaussian's trade-off curve only, by a threshold of its own; None at
            delta = 0.
        mu: the Gaussian's parameter, at least.
        threshold: chosen on the other half; larger scores mean "with canary". The counts are those above it.
        ceiling: the bound without any error in so many runs.
    """

    lower: float
    gaussian_lower: float | None
    mu: float
    threshold: float
    hits: int
    with_canary: int
    false_alarms: int
    without: int
    ceiling: float


def many_run_audit(release: Release, runs: int, delta: float, confidence: float = 0.95) -> ManyRunBound:
    """Audit any mechanism with `runs` releases with the canary and as many without."""
    return many_run_bound(*scores_of(release, runs), delta, confidence)


def scores_of(release: Release, runs: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores [runs] with the canary, and without. The two sides take turns, so that nothing drifts along with one."""
    scores = np.empty((2, runs))
    with display.progress("many-run audit", 2 * runs) as advance:
        for run in range(runs):
            for side, with_canary in enumerate((True, False)):
                scores[side, run] = release(with_canary, run + side * runs)
                advance(1)
    return scores[0], scores[1]


def many_run_bound(inside: np.ndarray, outside: np.ndarray, delta: float, confidence: float = 0.95) -> ManyRunBound:
    """The bound from scores with and without the canary: the first halves choose a threshold, the others count.

    A threshold chosen on the runs that are counted would make the bound exceed the truth more often than stated.
    """
    require(min(len(inside), len(outside)) >= 2, "runs=1 must be at least 2 a side: half of them choose the threshold.")
    (choose_in, count_in), (choose_out, count_out) = (np.array_split(each, 2) for each in (inside, outside))
    p, n = len(count_in), len(count_out)

    def errors(threshold: float) -> tuple[int, int, int, int]:
        return int((count_in <= threshold).sum()), p, int((count_out > threshold).sum()), n

    threshold, its_own = _best_thresholds(choose_in, choose_out, delta, confidence)
    misses, _, alarms, _ = errors(threshold)
    mu = mu_from_errors(*errors(its_own), confidence)
    return ManyRunBound(
        lower=epsilon_from_errors(misses, p, alarms, n, delta, confidence),
        gaussian_lower=gaussian_epsilon(mu, delta) if delta > 0 else None,
        mu=mu,
        threshold=threshold,
        hits=p - misses,
        with_canary=p,
        false_alarms=alarms,
        without=n,
        ceiling=epsilon_from_errors(0, p, 0, n, delta, confidence),
    )


def epsilon_from_errors(
    misses: int, positives: int, false_alarms: int, negatives: int, delta: float, confidence: float
) -> float:
    """max(0, ln((1 - FNR - delta) / FPR), ln((1 - FPR - delta) / FNR)), with Clopper-Pearson upper bounds.

    Each bound has half of 1 - confidence, so both hold at once and the larger logarithm may be taken.
    """
    fnr, fpr = _upper_rates(misses, positives, false_alarms, negatives, confidence)
    return float(_epsilon(np.array(fnr), np.array(fpr), delta))


def mu_from_errors(misses: int, positives: int, false_alarms: int, negatives: int, confidence: float) -> float:
    """The Gaussian version, max(0, Phi^-1(1 - FPR) - Phi^-1(FNR)) at the same bounds (Nasr et al., USENIX 2023).

    Tighter, and true of mechanisms with a Gaussian's trade-off curve only.
    """
    fnr, fpr = _upper_rates(misses, positives, false_alarms, negatives, confidence)
    return max(0.0, -normal_quantile(fpr) - normal_quantile(fnr)) if max(fnr, fpr) < 1 else 0.0


def _upper_rates(misses: int, positives: int, alarms: int, negatives: int, confidence: float) -> tuple[float, float]:
    tail = (1 - confidence) / 2
    return binomial_upper(misses, positives, tail), binomial_upper(alarms, negatives, tail)


def _epsilon(fnr: np.ndarray, fpr: np.ndarray, delta: float) -> np.ndarray:
    with np.errstate(divide="ignore"):
        first, second = (np.log(np.maximum(1 - a - delta, 0)) - np.log(b) for a, b in ((fnr, fpr), (fpr, fnr)))
    return np.maximum(0.0, np.maximum(first, second))


def _best_thresholds(inside: np.ndarray, outside: np.ndarray, delta: float, confidence: float) -> tuple[float, float]:
    """Those of all scores that give these runs the largest epsilon, and the largest mu; fewest errors among equals."""
    from scipy.special import betaincinv, ndtri

    candidates = np.unique(np.concatenate([inside, outside]))
    misses = np.searchsorted(np.sort(inside), candidates, side="right")
    alarms = len(outside) - np.searchsorted(np.sort(outside), candidates, side="right")
    tail = (1 - confidence) / 2
    fnr, fpr = (
        np.where(wrong == runs, 1.0, 1 - betaincinv(np.maximum(runs - wrong, 1), wrong + 1, tail))
        for wrong, runs in ((misses, len(inside)), (alarms, len(outside)))
    )
    share = misses / len(inside) + alarms / len(outside)
    epsilon, mu = (
        candidates[np.lexsort((share, -gain))[0]] for gain in (_epsilon(fnr, fpr, delta), -ndtri(fpr) - ndtri(fnr))
    )
    return float(epsilon), float(mu)
