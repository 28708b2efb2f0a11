"""The one-run bound: published values, enumeration, how often it exceeds the truth, and how far it reaches."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, norm
from torch import nn

from trivet.audit.leak_finding import LeakFinding
from trivet.audit.leak_test import Planting, StageTrainer
from trivet.audit.one_run import OneRun, one_run_epsilon, one_run_mu, one_run_p_value, right_guesses
from trivet.claims import PrivacyClaim
from trivet.data.dataset import Dataset, Splits
from trivet.data.digits import digits
from trivet.errors import BadValue
from trivet.methods import build, spec_of
from trivet.models.mlp import mlp
from trivet.objectives.plain import Plain
from trivet.privacy.dp_sgd import DpSgd
from trivet.randomness import generator
from trivet.statistics import gaussian_epsilon
from trivet.training.fit import Fit
from trivet.training.optimizers import Sgd


@pytest.mark.parametrize(
    ("right", "guesses", "canaries", "delta", "expected"),
    [
        (100, 100, 100, 0.0, "3.4930"),
        (100, 100, 1000, 1e-5, "3.4654"),
        (95, 100, 1000, 1e-5, "2.1652"),
        (600, 1000, 1000, 1e-5, "0.2972"),
        (500, 500, 5000, 1e-5, "4.9778"),
        (180, 200, 200, 1e-5, "1.80"),
        (50, 100, 100, 1e-5, "0.0000"),
    ],
)
def test_the_bound_has_its_known_values(right: int, guesses: int, canaries: int, delta: float, expected: str) -> None:
    digits_given = len(expected.split(".")[1])
    assert f"{one_run_epsilon(right, guesses, canaries, delta, 0.05):.{digits_given}f}" == expected


def test_all_guesses_right_without_delta_is_a_closed_form() -> None:
    """p^r = level, so epsilon = logit(level^(1/r))."""
    for guesses in (1, 7, 100, 4000):
        p = 0.05 ** (1 / guesses)
        expected = max(0.0, math.log(p / -math.expm1(math.log(0.05) / guesses)))
        assert one_run_epsilon(guesses, guesses, guesses, 0.0, 0.05) == pytest.approx(expected, rel=1e-9)


def test_the_p_value_is_the_formula_summed_term_by_term() -> None:
    for right, guesses, canaries, epsilon, delta in [
        (7, 9, 20, 0.7, 1e-3),
        (30, 40, 40, 2.0, 1e-4),
        (3, 3, 9, 0.0, 0.01),
    ]:
        p = math.exp(epsilon) / (1 + math.exp(epsilon))
        mass = [binom.pmf(k, guesses, p) for k in range(guesses + 1)]
        worst = max(sum(mass[right - i : right]) / i for i in range(1, right + 1))
        expected = sum(mass[right:]) + 2 * canaries * delta * worst
        assert one_run_p_value(right, guesses, canaries, epsilon, delta) == pytest.approx(min(1, expected), rel=1e-9)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 60), st.integers(0, 60), st.integers(0, 200), st.floats(0, 1e-3))
def test_more_right_guesses_never_lower_the_bound_and_more_canaries_or_delta_never_raise_it(
    guesses: int, right: int, idle: int, delta: float
) -> None:
    right = min(right, guesses)
    bound = one_run_epsilon(right, guesses, guesses + idle, delta, 0.05)
    assert one_run_epsilon(right, guesses, guesses + idle + 50, delta, 0.05) <= bound
    assert one_run_epsilon(right, guesses, guesses + idle, 2 * delta, 0.05) <= bound
    if right < guesses:
        assert one_run_epsilon(right + 1, guesses, guesses + idle, delta, 0.05) >= bound
    assert bound == 0 or one_run_p_value(right, guesses, guesses + idle, bound, delta) < 0.05


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 1.0, 3.0])
def test_on_randomised_response_it_exceeds_epsilon_no_more_often_than_stated_by_enumeration(epsilon: float) -> None:
    """Every guess is right with probability e^eps / (1 + e^eps), independently: exact, so no false alarms."""
    right = np.arange(201)
    bounds = np.array([one_run_epsilon(int(v), 200, 200, 0.0, 0.05) for v in right])
    share = binom.pmf(right, 200, 1 / (1 + math.exp(-epsilon)))[bounds > epsilon].sum()
    assert share <= 0.05
    assert share >= 0.01  # it is no looser than a count of 200 makes it


@pytest.mark.parametrize("mu", [0.3, 1.0, 2.0])
def test_on_gaussians_both_bounds_exceed_the_truth_no_more_often_than_stated_by_enumeration(mu: float) -> None:
    """With each canary behind a Gaussian of its own, the best guess is right with probability Phi(mu / 2)."""
    right = np.arange(121)
    mass = binom.pmf(right, 120, norm.cdf(mu / 2))
    bounds = np.array([one_run_mu(int(v), 120, 120, 0.05) for v in right])
    assert mass[bounds > mu].sum() <= 0.05
    general = np.array([one_run_epsilon(int(v), 120, 120, 1e-5, 0.05) for v in right])
    assert mass[general > gaussian_epsilon(mu, 1e-5)].sum() <= 0.05
    # Knowing the curve helps: its epsilon lies above the general one on average.
    assert (mass * [gaussian_epsilon(bound, 1e-5) for bound in bounds]).sum() > (mass * general).sum() > 0


def test_the_refuted_mu_agrees_with_the_recursion_step_by_step() -> None:
    def refuted(right: int, guesses: int, canaries: int, mu: float) -> bool:
        r, h = 0.05 * right / canaries, 0.05 * (guesses - right) / canaries
        for i in range(right - 1, -1, -1):
            following = max(h, norm.cdf(norm.ppf(r) - mu))
            r, h = r + i / (guesses - i) * (following - h), following
        return r + h > guesses / canaries

    for right, guesses, canaries in [(18, 20, 20), (40, 40, 100), (33, 50, 60)]:
        mu = one_run_mu(right, guesses, canaries, 0.05)
        assert refuted(right, guesses, canaries, mu - 1e-6)
        assert not refuted(right, guesses, canaries, mu + 1e-6)
    assert one_run_mu(10, 20, 20, 0.05) == 0.0


def test_scores_of_a_gaussian_mechanism_are_judged_soundly() -> None:
    """1,000 repetitions; more than 86 exceed the stated 5 % by chance with a probability below 1e-6."""
    draw, exceeding = generator(0, "gaussians"), 0
    for _ in range(1000):
        coins = torch.rand(200, generator=draw) < 0.5
        right = right_guesses(torch.randn(200, generator=draw) + coins, coins, 100)
        exceeding += one_run_p_value(right, 100, 200, gaussian_epsilon(1.0, 1e-5), 1e-5) < 0.05
    assert exceeding <= binom.isf(1e-6, 1000, 0.05)


def test_the_gaussian_bound_with_few_guesses_among_many_canaries_is_sound() -> None:
    """1,000 repetitions for each number of guesses; more than 86 exceed the stated 5 % with probability below 1e-6."""
    draw = generator(6, "gaussians")
    for mu in (0.0, 1.5):
        exceeding, wrong = dict.fromkeys((10, 60), 0), {}
        for _ in range(1000):
            coins = torch.rand(300, generator=draw) < 0.5
            scores = torch.randn(300, generator=draw) + mu * coins
            for guesses in exceeding:
                right = right_guesses(scores, coins, guesses)
                if (guesses, right) not in wrong:
                    wrong[guesses, right] = one_run_mu(right, guesses, 300, 0.05) > mu
                exceeding[guesses] += wrong[guesses, right]
        assert max(exceeding.values()) <= binom.isf(1e-6, 1000, 0.05)


def test_several_choices_share_the_level() -> None:
    draw = generator(5, "gaussians")
    coins = torch.rand(200, generator=draw) < 0.5
    scores = torch.randn(200, generator=draw) + 2 * coins
    found = OneRun(canaries=200, guesses=(40, 100, 200)).judge(scores, coins, 1e-5)
    each = [one_run_epsilon(right_guesses(scores, coins, r), r, 200, 1e-5, 0.05 / 3) for r in (40, 100, 200)]
    assert found.lower == pytest.approx(max(each))
    assert found.lower > 0


def test_taking_the_best_of_many_choices_without_paying_for_it_would_be_noticed() -> None:
    """The mutant: r chosen on the data it is judged on, where there is nothing to find. False alarm below 1e-6."""
    draw, wrong = generator(1, "nothing"), 0
    for _ in range(400):
        coins = torch.rand(200, generator=draw) < 0.5
        scores = torch.randn(200, generator=draw)
        wrong += any(
            one_run_p_value(right_guesses(scores, coins, r), r, 200, 0.0, 1e-5) < 0.05 for r in range(10, 201, 10)
        )
    assert wrong > binom.isf(1e-6, 400, 0.05)


def test_equal_scores_tell_nothing() -> None:
    coins = torch.rand(400, generator=generator(2, "coins")) < 0.5
    assert OneRun(canaries=400).judge(torch.zeros(400), coins, 1e-5).lower == 0


# --- on trained models ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data() -> Splits:
    return digits()


def _trainer(data: Splits, fit: Fit) -> StageTrainer:
    def build_model(seed: int) -> nn.Module:
        return mlp((1, 8, 8), 10, hidden=(64,), generator=generator(seed, "init"))

    return StageTrainer([("fit", fit)], build_model, data.test, seed=0)


def _private(noise_multiplier: float) -> Fit:
    rule = DpSgd(max_grad_norm=1.0, delta=1e-5, noise_multiplier=noise_multiplier)
    return Fit(Plain(), epochs=6, batch_size=256, optimizer=Sgd(lr=0.5, momentum=0.0), rule=rule)


def claim(epsilon: float, delta: float = 1e-5) -> PrivacyClaim:
    return PrivacyClaim(
        statement="private", value=epsilon, unit="epsilon", obtained={}, recheck="", artefact="", made_by="fit",
        delta=delta, adjacency="add_remove",
    )  # fmt: skip


def test_private_training_without_noise_is_refuted_by_dirac_canaries(data: Splits) -> None:
    """What somebody might claim at z = 1; nearly all of 100 guesses are right (a canary is never drawn with e^-6)."""
    test = OneRun(canaries=500, kind="dirac", access="white_box")
    found = test.run(_trainer(data, _private(0.0)), data, seed=3, claimed=claim(1.5))
    assert found.right >= 95
    assert found.contradicts
    assert found.lower is not None
    assert found.lower > 2


def test_private_training_with_its_noise_is_not_refuted(data: Splits) -> None:
    """z = 1 at rate 0.18 for 36 steps spends less than the 8 claimed, so it is refuted with probability below 1e-6."""
    test = OneRun(canaries=500, kind="dirac", access="white_box", confidence=1 - 1e-6)
    found = test.run(_trainer(data, _private(1.0)), data, seed=3, claimed=claim(8.0))
    assert not found.contradicts
    assert found.delta == 1e-5


def test_ordinary_training_to_the_end_betrays_mislabelled_images(data: Splits) -> None:
    fit = Fit(Plain(), epochs=40, batch_size=64, optimizer=Sgd(lr=0.2))
    found = OneRun(canaries=150).run(_trainer(data, fit), data, seed=4)
    assert found.guesses == 30
    assert found.right >= 27
    assert found.lower is not None
    assert found.lower > 1
    assert not found.contradicts  # nothing was claimed


def test_the_finding_holds_no_scores_and_survives_its_file(data: Splits) -> None:
    class Untrained:
        def initial(self, number: int) -> nn.Module:
            return mlp((1, 8, 8), 10, hidden=(4,))

        def __call__(self, train: Dataset, *, number: int, planting: Planting | None = None) -> nn.Module:
            assert planting is not None
            return planting.model(self.initial(number))

    found = OneRun(canaries=300).run(Untrained(), data, seed=0, claimed=claim(1.0))
    assert LeakFinding.model_validate_json(found.model_dump_json()) == found
    assert len(found.model_dump_json()) < 2000
    assert build("audit", found.spec) == OneRun(canaries=300)
    assert spec_of(OneRun(canaries=300)) == found.spec


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "dirac"}, "access='black_box' does not show"),
        ({"kind": "loud"}, "kind='loud' must be"),
        ({"access": "white box"}, "access='white box' must be"),
        ({"canaries": 1}, "canaries=1 must be at least 2"),
        ({"guesses": (3,)}, "guesses=.* must be even numbers"),
        ({"guesses": (2000,)}, "guesses=.* must be even numbers"),
        ({"confidence": 1.0}, "confidence=1.0 must lie"),
        ({"delta": 1.0}, "delta=1.0 must lie"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(BadValue, match=message):
        OneRun(**settings)  # type: ignore[arg-type]


def test_bounds_at_another_delta_than_the_claims_are_refused(data: Splits) -> None:
    with pytest.raises(BadValue, match=r"delta=1e-06 must be the claim's 1e-05"):
        OneRun(canaries=20, delta=1e-6).run(_trainer(data, _private(1.0)), data, seed=0, claimed=claim(1.0))
