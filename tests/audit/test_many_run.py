"""The many-run bound: published values, mechanisms of known epsilon, its ceiling, and the misuse it must not commit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binom, norm
from torch import nn

from trivet.audit.leak_test import Planting, StageTrainer
from trivet.audit.many_run import (
    ManyRun,
    epsilon_from_errors,
    many_run_audit,
    many_run_bound,
    mu_from_errors,
)
from trivet.claims import PrivacyClaim
from trivet.data.dataset import Dataset, Splits
from trivet.data.digits import digits
from trivet.errors import BadValue
from trivet.models.mlp import mlp
from trivet.objectives.plain import Plain
from trivet.privacy.dp_sgd import DpSgd
from trivet.statistics import gaussian_epsilon
from trivet.training.fit import Fit
from trivet.training.optimizers import Sgd


@pytest.mark.parametrize(
    ("hits", "positives", "alarms", "negatives", "delta", "expected"),
    [
        (500, 500, 0, 500, 0.0, "4.9056"),
        (1000, 1000, 0, 1000, 0.0, "5.6006"),
        (300, 500, 10, 500, 1e-5, "2.7234"),
        (250, 500, 250, 500, 1e-5, "0.0000"),
    ],
)
def test_the_bound_has_its_known_values(
    hits: int, positives: int, alarms: int, negatives: int, delta: float, expected: str
) -> None:
    assert f"{epsilon_from_errors(positives - hits, positives, alarms, negatives, delta, 0.95):.4f}" == expected


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 40), st.integers(0, 40), st.floats(0, 0.01), st.floats(0.5, 0.999))
def test_the_formula_is_the_published_one_with_beta_quantiles(
    misses: int, alarms: int, delta: float, confidence: float
) -> None:
    a = (1 - confidence) / 2
    fnr, fpr = (1.0 if k == 40 else beta.ppf(1 - a, k + 1, 40 - k) for k in (misses, alarms))
    logs = [math.log((1 - x - delta) / y) if x + delta < 1 else -math.inf for x, y in ((fnr, fpr), (fpr, fnr))]
    assert epsilon_from_errors(misses, 40, alarms, 40, delta, confidence) == pytest.approx(max(0.0, *logs), abs=1e-9)
    mu = max(0.0, norm.ppf(1 - fpr) - norm.ppf(fnr)) if max(fnr, fpr) < 1 else 0.0
    assert mu_from_errors(misses, 40, alarms, 40, confidence) == pytest.approx(mu, abs=1e-9)


def _gaussian(mu: float, draw: np.random.Generator, runs: int) -> tuple[np.ndarray, np.ndarray]:
    return mu + draw.standard_normal(runs), draw.standard_normal(runs)


@pytest.mark.parametrize("mu", [0.0, 1.0, 2.5])
def test_on_a_gaussian_it_exceeds_epsilon_no_more_often_than_stated(mu: float) -> None:
    """400 audits of 200 runs a side; at the stated 5 %, more than 42 would be chance with probability 1e-6."""
    draw = np.random.default_rng(0)
    epsilon, most = gaussian_epsilon(mu, 1e-5), binom.isf(1e-6, 400, 0.05)
    found = [many_run_bound(*_gaussian(mu, draw, 200), 1e-5) for _ in range(400)]
    assert sum(each.lower > epsilon for each in found) <= most
    assert sum(each.mu > mu for each in found) <= most
    if mu:
        assert np.median([each.lower for each in found]) > 0.4
        assert np.median([each.mu for each in found]) > 0.4 * mu


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_on_randomised_response_it_stays_below_epsilon_and_comes_near(epsilon: float) -> None:
    """The strongest mechanism of its epsilon: 400 audits, false alarm below 1e-6."""
    draw, truth = np.random.default_rng(1), 1 / (1 + math.exp(-epsilon))
    found = [
        many_run_bound((draw.random(2000) < truth).astype(float), (draw.random(2000) > truth).astype(float), 0.0).lower
        for _ in range(400)
    ]
    assert sum(each > epsilon for each in found) <= binom.isf(1e-6, 400, 0.05)
    assert np.median(found) > 0.7 * epsilon - 0.1


def test_a_threshold_chosen_on_the_counted_runs_would_be_noticed() -> None:
    """The Laplace mechanism, where every threshold beyond the shift shows epsilon, and one of them too much.

    The mutant counts the runs that chose; 200 audits each at 80 %, false alarms below 1e-6 both ways.
    """
    draw, too_often = np.random.default_rng(2), binom.isf(1e-6, 200, 0.2)
    honest = mutant = 0
    for _ in range(200):
        inside, outside = draw.laplace(1, 1, 600), draw.laplace(0, 1, 600)
        honest += many_run_bound(inside, outside, 0.0, 0.8).lower > 1
        mutant += many_run_bound(np.tile(inside, 2), np.tile(outside, 2), 0.0, 0.8).lower > 1
    assert honest <= too_often < mutant


def test_what_the_first_halves_show_is_not_counted() -> None:
    ones, zeros = np.ones(20), np.zeros(20)
    found = many_run_bound(np.concatenate([ones, zeros]), np.concatenate([zeros, zeros]), 0.0)
    assert (found.lower, found.mu, found.hits, found.false_alarms) == (0, 0, 0, 0)
    found = many_run_bound(np.concatenate([ones, ones]), np.concatenate([zeros, ones]), 0.0)
    assert (found.lower, found.mu, found.hits, found.false_alarms) == (0, 0, 20, 20)


def test_without_noise_it_reaches_its_ceiling_and_exceeds_any_claim_below() -> None:
    found = many_run_audit(lambda with_canary, _: float(with_canary), 1000, 0.0)
    assert found.lower == found.ceiling == pytest.approx(4.9056, abs=5e-5)
    assert (found.hits, found.false_alarms) == (500, 0)


@pytest.mark.parametrize("z", [0.5, 1.0, 2.0])
def test_a_dirac_canary_in_one_full_batch_step_has_the_exact_trade_off_curve(z: float) -> None:
    """q = 1, T = 1: TPR = Phi(Phi^-1(FPR) + 1 / z), so the Gaussian bound of 10^4 runs comes within 1 of the truth.

    The counts are binomial: outside six standard errors with probability below 1e-8. Of 20 audits at 95 %, more than
    9 exceed the truth with a probability below 1e-6.
    """
    draw, exact = np.random.default_rng(3), gaussian_epsilon(1 / z, 1e-5)
    found = [many_run_bound(*_gaussian(1 / z, draw, 10_000), 1e-5) for _ in range(20)]
    for each in found:
        fpr = norm.sf(each.threshold)
        tpr = norm.cdf(norm.ppf(fpr) + 1 / z)
        assert abs(each.hits - 5000 * tpr) < 6 * math.sqrt(5000 * tpr * (1 - tpr)) + 1
        assert abs(each.false_alarms - 5000 * fpr) < 6 * math.sqrt(5000 * fpr * (1 - fpr)) + 1
    assert sum(each.lower > exact for each in found) <= 9
    assert np.median([each.lower for each in found]) > 0
    gaussian = [each.gaussian_lower for each in found if each.gaussian_lower is not None]
    assert sum(each > exact for each in gaussian) <= 9
    assert np.median(gaussian) > exact - 1


def test_runs_are_numbered_once_and_take_turns() -> None:
    seen: list[tuple[bool, int]] = []

    def release(with_canary: bool, run: int) -> float:
        seen.append((with_canary, run))
        return 0.0

    assert many_run_audit(release, 4, 1e-5).lower == 0
    assert [side for side, _ in seen] == [True, False] * 4
    assert sorted(run for _, run in seen) == list(range(8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"runs": 3}, "runs=3 must be at least 4"),
        ({"kind": "dirac"}, "access='black_box' does not show"),
        ({"confidence": 0.0}, "confidence=0.0 must lie"),
        ({"delta": -1.0}, "delta=-1.0 must lie"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(BadValue, match=message):
        ManyRun(**settings)  # type: ignore[arg-type]


def claim(epsilon: float) -> PrivacyClaim:
    return PrivacyClaim(
        statement="private", value=epsilon, unit="epsilon", obtained={}, recheck="", artefact="", made_by="fit",
        delta=1e-5, adjacency="add_remove",
    )  # fmt: skip


class Recording:
    """A trainer that does what one step of ordinary gradient descent on the canary would: it learns it, or nothing."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def initial(self, number: int) -> nn.Module:
        torch.manual_seed(number)
        return mlp((1, 8, 8), 10, hidden=(8,))

    def __call__(self, train: Dataset, *, number: int, planting: Planting | None = None) -> nn.Module:
        self.numbers.append(number)
        assert planting is not None
        model = planting.model(self.initial(number))
        included = planting.included[0]  # type: ignore[attr-defined]
        for _ in range(20 if included else 0):
            canary = train.batch(torch.tensor([len(train) - 1]))
            loss = nn.functional.cross_entropy(model(canary.inputs), canary.labels)
            for parameter, gradient in zip(
                model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
            ):
                parameter.data -= 0.1 * gradient
        return model


def test_a_training_that_learns_the_canary_by_heart_contradicts_its_claim() -> None:
    data: Splits = digits()
    trainer = Recording()
    found = ManyRun(runs=40).run(trainer, data, seed=0, claimed=claim(1.0))
    assert found.lower == pytest.approx(epsilon_from_errors(0, 20, 0, 20, 1e-5, 0.95))
    assert found.contradicts
    assert (found.guesses, found.right, found.trained) == (40, 40, 80)
    assert sorted(trainer.numbers) == list(range(80))


def test_dp_sgd_without_noise_is_refuted() -> None:
    """One full-batch step and a dirac canary: 6 and 6 counted runs without an error show epsilon 0.16."""
    data = digits()
    data = Splits(data.train.select(slice(0, 40)), data.test)
    rule = DpSgd(max_grad_norm=1.0, delta=1e-5, noise_multiplier=0.0)
    fit = Fit(Plain(), epochs=1, batch_size=40, optimizer=Sgd(lr=0.1), rule=rule)
    trainer = StageTrainer([("fit", fit)], lambda _: mlp((1, 8, 8), 10, hidden=(4,)), data.test, seed=0)
    found = ManyRun(runs=12, kind="dirac", access="white_box").run(trainer, data, seed=0, claimed=claim(0.1))
    assert found.right == 12
    assert found.contradicts
