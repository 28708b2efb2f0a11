"""Randomized smoothing against classifiers whose smoothed version is known exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, kstest, norm
from torch import Tensor, nn

from trivet.certify import smoothing as smoothing_module
from trivet.certify.certifier import ABSTAIN, join
from trivet.certify.smoothing import Smoothing
from trivet.errors import BadValue
from trivet.methods import build
from trivet.randomness import generator


class Logits(nn.Module):
    """A model from a function of a batch."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def half_space(weight: Tensor, offset: float = 0.0) -> Logits:
    """Two classes: 1 where <weight, x - 1/2> + offset > 0. Smoothing leaves its boundary where it is."""

    def logits(x: Tensor) -> Tensor:
        margin = (x - 0.5).flatten(1) @ weight + offset
        return torch.stack([-margin, margin], 1)

    return Logits(logits)


def constant(label: int, classes: int = 4) -> Logits:
    return Logits(lambda x: torch.eye(classes)[label].expand(len(x), classes))


def coin() -> Logits:
    """Both classes equally likely around x = 1/2, whatever the noise's variance."""
    return half_space(torch.tensor([1.0]))


def small_cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 5)
    )


def images(n: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.rand(n, *shape, generator=generator(seed, "test images"))


# The radius as a function of the votes


def test_the_radius_never_exceeds_what_fifty_digits_allow_and_reaches_it_to_nine() -> None:
    with mpmath.workdps(50):
        for n, count in [(100, 90), (1000, 990), (1000, 560), (10_000, 9_999), (10_000, 5_200)]:
            for sigma in (0.12, 0.5, 0.7):
                probability = mpmath.ncdf(mpmath.mpf(Smoothing(sigma, n=n).radius_of(count)) / mpmath.mpf(sigma))
                for factor, sound in [(1, True), (1 + mpmath.mpf(10) ** -6, False)]:
                    p = probability * factor
                    tail = mpmath.fsum(
                        mpmath.binomial(n, k) * p**k * (1 - p) ** (n - k) for k in range(count, min(n, count + 800) + 1)
                    )
                    assert (tail <= mpmath.mpf("0.001")) is sound, (n, count, sigma, factor)


def test_the_largest_radius_is_the_quantile_of_the_nth_root_of_alpha() -> None:
    for n, published in [(1_000, 2.463), (10_000, 3.199), (100_000, 3.811)]:
        radius = Smoothing(1.0, n=n).radius_of(n)
        assert radius == pytest.approx(norm.ppf(0.001 ** (1 / n)), rel=1e-6)
        assert radius == pytest.approx(published, abs=5e-4)


@settings(deadline=None, max_examples=50)
@given(st.floats(0.01, 5), st.floats(0.01, 5), st.integers(0, 1000))
def test_the_radius_scales_linearly_in_sigma_and_grows_with_the_votes(one: float, two: float, count: int) -> None:
    for norm_name in ("L2", "L1"):
        first, second = (Smoothing(s, n=1000, norm=norm_name) for s in (one, two))  # type: ignore[arg-type]
        # float32 may draw the noise narrower than asked for, by half a unit in its last place.
        assert first.radius_of(count) * two == pytest.approx(second.radius_of(count) * one, rel=2e-7)
        if count:
            assert first.radius_of(count - 1) <= first.radius_of(count)


def test_no_radius_counts_a_wider_noise_than_float32_draws() -> None:
    for norm_name in ("L2", "L1"):
        for sigma in np.random.default_rng(0).uniform(0.05, 1, 100):
            smoothing = Smoothing(sigma, norm=norm_name)
            drawn = np.float32(sigma if norm_name == "L2" else math.sqrt(3) * sigma)
            assert smoothing._scale <= float(drawn)


def test_half_of_the_votes_or_less_certify_nothing() -> None:
    smoothing = Smoothing(0.5, n=1000)
    assert smoothing.radius(0.5) == 0.0
    assert smoothing.radius(math.nan) == 0.0
    assert smoothing.radius_of(500) == 0.0
    # 550 is the first count that a fair coin reaches with probability below alpha.
    assert binom.sf(549, 1000, 0.5) < 0.001 < binom.sf(548, 1000, 0.5)
    assert smoothing.radius_of(549) == 0.0 < smoothing.radius_of(550)


def _union_probability(x: np.ndarray, intervals: list[tuple[float, float]], cdf: Callable[..., Any]) -> np.ndarray:
    """P(x + noise in the union of the intervals)."""
    return sum(cdf(high - x) - cdf(low - x) for low, high in intervals)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.floats(-2, 2), min_size=2, max_size=8, unique=True).map(sorted),
    st.floats(-1, 1),
    st.floats(0.1, 1),
    st.sampled_from(["L2", "L1"]),
)
def test_no_one_dimensional_classifier_changes_inside_its_exact_radius(
    cuts: list[float], x: float, sigma: float, norm_name: Any
) -> None:
    lam = math.sqrt(3) * sigma
    cdf = (lambda t: norm.cdf(t / sigma)) if norm_name == "L2" else lambda t: np.clip((t + lam) / (2 * lam), 0, 1)
    intervals = list(zip(cuts[::2], cuts[1::2], strict=False))
    probability = float(_union_probability(np.array(x), intervals, cdf))
    radius = Smoothing(sigma, norm=norm_name).radius(min(probability, 1 - 1e-12))
    near = np.linspace(x - radius, x + radius, 2001)[1:-1]
    if radius > 0:
        assert _union_probability(near, intervals, cdf).min() > 0.5 - 1e-7


def test_a_half_line_attains_the_l1_radius_exactly_until_the_noise_ends() -> None:
    sigma, lam = 0.3, 0.3 * math.sqrt(3)
    for distance in (0.01, 0.1, 0.5, lam):
        probability = min(1.0, (lam + distance) / (2 * lam))
        assert Smoothing(sigma, norm="L1").radius(probability) == pytest.approx(distance, rel=1e-7)
    assert Smoothing(sigma, norm="L1").radius(1.0) <= lam


# Certificates of whole models


@pytest.mark.parametrize("norm_name", ["L2", "L1"])
def test_the_radius_of_a_half_space_is_below_its_distance_and_approaches_it(norm_name: Any) -> None:
    weight = torch.tensor([3.0, -1.0, 0.5, 2.0])
    x = images(20, 1, 2, 2)
    margins = ((x - 0.5).flatten(1) @ weight).double()
    distance = margins.abs() / weight.double().norm()
    if norm_name == "L1":  # a single-pixel half-space, where uniform noise is tight
        weight = torch.tensor([0.0, 0.0, 2.0, 0.0])
        distance = (x - 0.5).flatten(1)[:, 2].double().abs()
        margins = (x - 0.5).flatten(1)[:, 2].double()
    few, many = (
        Smoothing(0.5, n=n, alpha=1e-6, norm=norm_name).certify(half_space(weight), x, seed=3) for n in (500, 20_000)
    )
    for certificates in (few, many):
        certified = ~certificates.abstained
        assert bool((certificates.labels == (margins > 0).long())[certified].all())
        assert bool((certificates.radii <= distance)[certified].all())  # false alarm: 20 * 1e-6
    reached = many.radii / distance
    assert float(reached[distance > 0.2].min()) > 0.8
    assert float((many.radii - few.radii).mean()) > 0.02


def test_no_attack_within_the_radius_flips_a_smoothed_linear_classifier() -> None:
    weight = torch.randn(12, generator=generator(1, "weight"), dtype=torch.float64)
    x = images(40, 3, 2, 2).double()
    certificates = Smoothing(0.25, n=2_000, alpha=1e-6).certify(half_space(weight.float()), x, seed=0)
    certified = ~certificates.abstained

    def smoothed(points: Tensor) -> Tensor:  # exact: the noise is symmetric about the half-space's boundary
        return (((points - 0.5).flatten(-3) @ weight) > 0).long()

    shrink = 1 - 1e-12
    worst = -torch.sign((x - 0.5).flatten(1) @ weight)[:, None] * weight / weight.norm()
    attacked = x + shrink * (certificates.radii[:, None] * worst).view_as(x)
    random = torch.randn(200, *x.shape, generator=generator(2, "search"), dtype=torch.float64)
    random = random / random.flatten(2).norm(dim=2)[..., None, None, None] * certificates.radii.view(-1, 1, 1, 1)
    assert int(certified.sum()) > 20
    assert torch.equal(smoothed(attacked)[certified], certificates.labels[certified])
    assert bool((smoothed(x + shrink * random) == certificates.labels)[:, certified].all())
    beyond = x + 1.6 * (certificates.radii[:, None] * worst).view_as(x)  # power: not far outside it does flip
    assert bool((smoothed(beyond) != certificates.labels)[certified].any())


def test_a_constant_model_gets_the_largest_radius_whatever_n0() -> None:
    x = images(3, 1, 4, 4)
    for n0 in (1, 100, 250):
        certificates = Smoothing(0.5, n0=n0, n=500).certify(constant(2), x, seed=0)
        assert certificates.labels.tolist() == [2, 2, 2]
        assert certificates.radii.tolist() == [Smoothing(0.5, n=500).radius_of(500)] * 3


def test_even_votes_abstain_and_abstentions_have_no_radius() -> None:
    x = torch.full((5, 1), 0.5)
    certificates = Smoothing(0.5, n=1_000, alpha=1e-6).certify(coin(), x, seed=0)
    assert bool(certificates.abstained.all())
    assert certificates.radii.tolist() == [0.0] * 5
    assert Smoothing(0.5).predict(coin(), x, seed=0, n=500).tolist() == [ABSTAIN] * 5


# The statistics of the two sample sets


def _false_certificates(smoothing: Smoothing, seed: int = 0, inputs: int = 10_000) -> int:
    """How many of 10,000 fair coins get certified: each is a claim P > 1/2 about a probability of exactly 1/2."""
    certificates = smoothing.certify(coin(), torch.full((inputs, 1), 0.5), seed=seed)
    return int((~certificates.abstained).sum())


def test_false_certificates_are_as_rare_as_promised() -> None:
    smoothing = Smoothing(0.5, n0=100, n=100, alpha=0.05, batch_size=20_000)
    false = _false_certificates(smoothing)
    allowed = binom.isf(1e-6, 10_000, 0.05)  # exceeded once in a million seeds if the promise holds
    expected = binom.sf(58, 100, 0.5)  # P(59 of 100 votes or more), the least count that certifies
    assert smoothing.radius_of(58) == 0.0 < smoothing.radius_of(59)
    assert false <= allowed
    assert abs(false - 10_000 * expected) < 5 * math.sqrt(10_000 * expected)  # and no rarer than the bound makes them


def test_choosing_the_class_by_the_estimation_samples_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_stream(seed: int, *purpose: str | int, device: Any) -> torch.Generator:
        return generator(seed, *purpose[:-1], device=device)

    monkeypatch.setattr(smoothing_module, "generator", one_stream)  # both stages now draw the same noise
    false = _false_certificates(Smoothing(0.5, n0=100, n=100, alpha=0.05, batch_size=20_000))
    assert false > binom.isf(1e-6, 10_000, 0.05)


def test_predictions_of_a_coin_are_as_rare_as_alpha_allows() -> None:
    labels = Smoothing(0.5, alpha=0.05, batch_size=10_000).predict(coin(), torch.full((2_000, 1), 0.5), seed=1, n=100)
    assert 0 < int((labels != ABSTAIN).sum()) <= binom.isf(1e-6, 2_000, 0.05)


def test_predict_names_the_majority_and_agrees_with_the_exact_binomial_test() -> None:
    x = torch.linspace(0.3, 0.7, 41)[:, None]
    smoothing = Smoothing(0.5, alpha=0.01)
    labels = smoothing.predict(coin(), x, seed=4, n=400)
    votes, _ = smoothing._votes(coin(), x, (("predict", 400),), 4, torch.arange(41), None)
    for label, (zero, one) in zip(labels.tolist(), votes[:, 0, :2].tolist(), strict=True):
        two_sided = min(1.0, 2 * binom.sf(max(zero, one) - 1, 400, 0.5))
        assert label == (int(one > zero) if two_sided <= 0.01 else ABSTAIN)
    assert len(set(labels.tolist())) == 3


def _noise(smoothing: Smoothing, copies: int, dimension: int) -> Tensor:
    """All the noise that one input's estimation saw."""
    seen: list[Tensor] = []

    def record(x: Tensor) -> Tensor:
        answer = torch.zeros(len(x), 2)  # fails, and so records nothing, where the model is only being traced
        seen.append(x.clone() - 0.5)
        return answer

    smoothing.certify(Logits(record), torch.full((1, dimension), 0.5), seed=0)
    return torch.cat(seen)[-copies:]


@pytest.mark.parametrize("norm_name", ["L2", "L1"])
def test_the_noise_has_the_distribution_the_radius_assumes(norm_name: Any) -> None:
    sigma, lam = 0.5, 0.5 * math.sqrt(3)
    noise = _noise(Smoothing(sigma, n=2_000, norm=norm_name), 2_000, 10).double()
    law = (norm.cdf, (0, sigma)) if norm_name == "L2" else (lambda t: np.clip((t + lam) / (2 * lam), 0, 1), ())
    assert kstest(noise.flatten().numpy(), law[0], args=law[1]).pvalue > 1e-6
    assert kstest(noise.flatten().numpy() * 1.1, law[0], args=law[1]).pvalue < 1e-6  # power
    covariance = torch.cov(noise.T) / sigma**2
    assert float((covariance - torch.eye(10)).abs().max()) < 6 / math.sqrt(2_000)
    assert len(noise.unique(dim=0)) == 2_000


# The promises of the implementation


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_result_does_not_depend_on_batch_size_or_sharding(precision: Any) -> None:
    net, x = small_cnn(), images(5, 2, 6, 6)
    smoothing = Smoothing(0.3, n0=30, n=730, precision=precision)
    whole = smoothing.certify(net, x, seed=7)
    for batch_size in (1, 32, 100, 250, 10_000):
        other = replace(smoothing, batch_size=batch_size).certify(net, x, seed=7)
        # One copy at a time takes other kernels, which round a tie differently now and then.
        assert int((other.evidence["count"] - whole.evidence["count"]).abs().max()) <= (2 if batch_size == 1 else 0)
    parts = [
        smoothing.certify(net, x[part], seed=7, index=part) for part in (torch.tensor([4, 1]), torch.tensor([0, 2, 3]))
    ]
    assert torch.equal(join(parts).evidence["count"], whole.evidence["count"])
    assert torch.equal(join(parts).radii, whole.radii)


def test_inputs_seeds_and_stages_have_noise_of_their_own() -> None:
    net = half_space(torch.ones(4))
    same = torch.full((50, 4), 0.5)
    first, second = (Smoothing(0.5, n=1_000).certify(net, same, seed=seed).evidence["count"] for seed in (0, 1))
    assert len(first.unique()) > 20
    assert not torch.equal(first, second)


def test_the_model_is_left_as_it_was() -> None:
    net, x = small_cnn(), images(3, 2, 6, 6)
    net.train()
    net[1].eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    training = Smoothing(0.3, n=200).certify(net, x, seed=0)
    Smoothing(0.3).predict(net, x, seed=0, n=100)
    assert [module.training for module in net] == [True, False, True, True, True, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())
    evaluated = Smoothing(0.3, n=200).certify(net.eval(), x, seed=0)
    assert torch.equal(training.evidence["count"], evaluated.evidence["count"])  # dropout and BatchNorm were off


def test_certificates_follow_the_weights_the_model_has_now() -> None:
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), images(2, 1, 2, 2)
    with torch.no_grad():
        net[1].weight.zero_()
        net[1].bias.copy_(torch.tensor([1.0, 0.0]))
        assert Smoothing(0.3, n=200).certify(net, x, seed=0).labels.tolist() == [0, 0]
        net[1].bias.copy_(torch.tensor([0.0, 1.0]))
        assert Smoothing(0.3, n=200).certify(net, x, seed=0).labels.tolist() == [1, 1]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_certify_and_predict_nothing(value: float) -> None:
    x = images(3, 1, 4, 4)
    poisoned = Logits(lambda x: torch.tensor([1.0, 0.0, value]).expand(len(x), 3))
    assert bool(Smoothing(0.5, n=500).certify(poisoned, x, seed=0).abstained.all())
    assert Smoothing(0.5).predict(poisoned, x, seed=0, n=100).tolist() == [ABSTAIN] * 3


def test_a_few_logits_that_are_not_finite_only_shrink_the_radius() -> None:
    def sometimes(x: Tensor) -> Tensor:
        broken = (x.flatten(1)[:, 0] > 1.0).float()[:, None]
        return torch.tensor([1.0, 0.0]) + torch.where(broken > 0, math.nan, 0.0)

    x = torch.full((1, 1), 0.5)
    clean = Smoothing(0.5, n=1_000).certify(Logits(lambda x: torch.tensor([1.0, 0.0]).expand(len(x), 2)), x, seed=0)
    broken = Smoothing(0.5, n=1_000).certify(Logits(sometimes), x, seed=0)
    assert broken.labels.tolist() == clean.labels.tolist() == [0]
    assert 0 < float(broken.radii) < float(clean.radii)
    assert int(broken.evidence["count"]) == pytest.approx(1_000 * norm.cdf(1.0), abs=6 * math.sqrt(1_000 * 0.16 * 0.84))


@pytest.mark.parametrize(
    "coupled",
    [
        Logits(lambda x: (x - x.mean(0)).flatten(1)[:, :3]),
        nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), nn.Flatten(), nn.Linear(16, 3)),
        nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.BatchNorm1d(3, affine=False, track_running_stats=False)),
    ],
)
def test_models_that_couple_the_rows_of_a_batch_are_refused(coupled: nn.Module) -> None:
    with pytest.raises(BadValue, match="depends on the other inputs of its batch"):
        Smoothing(0.5, n=100).certify(coupled, images(2, 1, 4, 4), seed=0)


def test_models_with_noise_of_their_own_are_certified() -> None:
    noisy = Logits(lambda x: torch.tensor([3.0, 0.0]) + torch.randn(len(x), 2))
    certificates = Smoothing(0.5, n=500).certify(noisy, images(1, 1, 4, 4), seed=0)
    assert certificates.labels.tolist() == [0]
    assert 400 < int(certificates.evidence["count"]) < 500


def test_the_conditions_name_the_arithmetic_the_noise_and_the_chance_of_error() -> None:
    x = images(1, 2, 6, 6)
    for precision, phrase in [
        ("fp32", "of the float32 evaluation"),
        ("bf16", "of the bfloat16 evaluation of the model"),
    ]:
        certificates = Smoothing(0.3, n=100, precision=precision).certify(small_cnn(), x, seed=0)  # type: ignore[arg-type]
        text = "\n".join(certificates.conditions)
        for words in (phrase, "N(0, 0.3^2)", "0.001", "real arithmetic", "smoothed classifier"):
            assert words in text
    assert certificates.alpha == 0.001


def test_progress_counts_inputs() -> None:
    told: list[float] = []
    Smoothing(0.5, n=950).certify(
        constant(0), images(4, 1, 4, 4), seed=0, advance=lambda amount=1, _="": told.append(amount)
    )
    assert sum(told) == pytest.approx(4.0)
    assert len(told) == 11  # 4 * 1050 copies in batches of up to 400: full ones, but for the odd blocks of 50


def test_no_inputs_give_no_certificates() -> None:
    certificates = Smoothing(0.5).certify(constant(0), torch.zeros(0, 1, 4, 4), seed=0)
    assert len(certificates) == 0
    assert len(Smoothing(0.5).predict(constant(0), torch.zeros(0, 1, 4, 4), seed=0)) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"sigma": 0.0},
        {"sigma": -1.0},
        {"sigma": math.inf},
        {"sigma": math.nan},
        {"n0": 0},
        {"n": 0},
        {"alpha": 0.0},
        {"alpha": 1.0},
        {"norm": "Linf"},
        {"precision": "fp8"},
        {"batch_size": 0},
    ],
)
def test_settings_outside_their_range_are_refused_by_name(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(BadValue, match=f"{name}="):
        Smoothing(**({"sigma": 0.5} | wrong))


@pytest.mark.parametrize("value", [-0.01, 1.01, math.nan])
def test_inputs_outside_the_unit_range_are_refused(value: float) -> None:
    x = images(2, 1, 4, 4)
    x[1, 0, 0, 0] = value
    with pytest.raises(BadValue, match=r"must lie in \[0, 1\]"):
        Smoothing(0.5).certify(constant(0), x, seed=0)
    with pytest.raises(BadValue, match=r"must lie in \[0, 1\]"):
        Smoothing(0.5).predict(constant(0), x, seed=0)


def test_an_index_that_does_not_fit_is_refused() -> None:
    with pytest.raises(BadValue, match=r"index must be \[2\]"):
        Smoothing(0.5).certify(constant(0), images(2, 1, 4, 4), seed=0, index=torch.arange(3))


def test_recipes_can_name_it() -> None:
    assert build("certify", {"name": "smoothing", "sigma": 0.25, "n": 1000}) == Smoothing(0.25, n=1000)
