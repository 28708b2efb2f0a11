"""The certificate of PixelDP: bounds that cover, linear classifiers whose radius is known, models to be refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import beta, binom, kstest, laplace, norm
from torch import Tensor, nn

from trivet.certify.certificate_file import CertificateFile
from trivet.certify.certifier import ABSTAIN, join
from trivet.certify.divergence_radius import gaussian_reach, laplace_reach
from trivet.certify.pixeldp import PixelDP
from trivet.certify.smoothing import Smoothing
from trivet.errors import BadValue, TrivetError
from trivet.methods import build
from trivet.models.heterogeneous_noise import heterogeneous_noise_cnn
from trivet.models.noise_layer import NoiseLayer, NoisyNetwork
from trivet.models.pixeldp import pixeldp_cnn
from trivet.randomness import generator


class Then(nn.Module):
    """What follows the noise, from a function of a batch."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, h: Tensor) -> Tensor:
        return self.function(h)


def half_space(weight: Tensor, inner: Tensor, law: Any = "gaussian", scale: float = 0.3) -> NoisyNetwork:
    """Class 1 where <inner, W (x - 1/2) + noise> > 0: the average answer has exactly that boundary, without noise."""
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight.data.copy_(weight)
    linear.bias.data.copy_(-0.5 * weight.sum(1))
    after = Then(lambda h: torch.stack([-h @ inner, h @ inner], 1))
    return NoisyNetwork(nn.Sequential(nn.Flatten(), linear), NoiseLayer(law, scale), nn.Sequential(nn.Flatten(), after))


def network(**settings: Any) -> NoisyNetwork:
    made: NoisyNetwork = build(
        "models",
        {"name": "pixeldp_cnn", "hidden": 16, **settings},
        input_shape=(1, 8, 8),
        num_classes=4,
        generator=torch.Generator().manual_seed(3),
    )
    return made


def images(count: int, *shape: int) -> Tensor:
    return torch.rand(count, *(shape or (1, 8, 8)), generator=generator(0, "test images"))


# Soundness


@pytest.mark.parametrize(
    ("law", "ball", "bound"),
    [
        ("gaussian", "L2", "classical"),
        ("gaussian", "L2", "analytic"),
        ("gaussian", "L1", "heterogeneous"),
        ("laplace", "L1", "classical"),
    ],
)
def test_no_radius_passes_the_boundary_of_a_half_space(law: Any, ball: Any, bound: Any) -> None:
    """The distance to the boundary is the margin over the dual norm of the normal: known without any noise.

    16 certificates at alpha 1e-8: a false alarm has odds below 2e-7.
    """
    torch.manual_seed(1)
    weight, inner, x = torch.randn(3, 4) / 2, torch.randn(3), images(16, 1, 2, 2)
    certifier = PixelDP(ball, n=2_000, alpha=1e-8, bound=bound)
    certificates = certifier.certify(half_space(weight, inner, law), x, seed=0)
    normal = (inner @ weight).double()
    margin = (x.flatten(1).double() - 0.5) @ normal
    distance = margin.abs() / (normal.norm() if ball == "L2" else normal.abs().max())
    claimed = ~certificates.abstained
    assert int(claimed.sum()) >= 6
    assert bool((certificates.labels[claimed] == (margin > 0).long()[claimed]).all())
    assert bool((certificates.radii < distance).all())
    assert float(certificates.radii.max()) > 0


@pytest.mark.parametrize("law", ["gaussian", "laplace"])
def test_the_bounds_enclose_a_probability_that_is_known(law: Any) -> None:
    """Two classes, one coordinate: P(class 1) = F((x - 1/2) / scale). 12 inputs at alpha 1e-7."""
    certifier = PixelDP("L1", n=3_000, alpha=1e-7)
    model = half_space(torch.ones(1, 1), torch.ones(1), law, 0.4)
    x = torch.linspace(0, 1, 12).view(12, 1, 1, 1)
    found = certifier.certify(model, x, seed=3).evidence
    p = (norm if law == "gaussian" else laplace).cdf((x.flatten().double().numpy() - 0.5) / 0.4)
    top = np.maximum(p, 1 - p)
    assert bool((found["lower"].numpy() <= top).all())
    assert bool((found["upper"].numpy() >= 1 - top).all())
    assert float((torch.from_numpy(top) - found["lower"]).max()) < 0.08  # not vacuous: 5.6 deviations of 0.009, and CP


@pytest.mark.parametrize(("scores", "n"), [("counts", 60), ("softmax", 60), ("softmax", 700)])
def test_all_bounds_hold_at_once_as_often_as_promised(scores: Any, n: int) -> None:
    """Scores with known expectations, near-ties included, so that the label is chosen by the same draws that bound it.

    1,500 certificates at alpha = 0.2; more failures than the quantile 1 - 1e-6 of Binomial(1500, 0.2) are an alarm.
    """
    rng = np.random.default_rng(5)
    p = np.array([0.36, 0.34, 0.2, 0.1])
    certifier = PixelDP(n=n, alpha=0.2, scores=scores)
    failures = 0
    for _ in range(1_500):
        if scores == "counts":
            first = second = torch.from_numpy(rng.multinomial(n, p).astype(float))
        else:
            rows = torch.from_numpy(rng.dirichlet(2 * p, n))
            first, second = rows.sum(0), rows.square().sum(0)
        top, lower, upper = certifier._bounds(first, second)
        failures += lower > p[top] or upper < np.delete(p, top).max()
    assert failures <= binom.ppf(1 - 1e-6, 1_500, 0.2)
    # the same check would notice bounds from half as many draws as they pretend
    if scores == "counts":
        pretended = 0
        for _ in range(1_500):
            top, lower, upper = certifier._bounds(*[2 * torch.from_numpy(rng.multinomial(n // 8, p) * 4.0)] * 2)
            pretended += lower > p[top] or upper < np.delete(p, top).max()
        assert pretended > binom.ppf(1 - 1e-6, 1_500, 0.2)


def test_counts_give_two_sided_clopper_pearson_at_alpha_over_the_classes() -> None:
    first = torch.tensor([70.0, 20.0, 10.0])
    top, lower, upper = PixelDP(n=100, alpha=0.06)._bounds(first, first)
    tail = 0.06 / 3 / 2
    assert top == 0
    assert lower == pytest.approx(beta.ppf(tail, 70, 31), abs=1e-9)
    assert upper == pytest.approx(beta.ppf(1 - tail, 21, 80), abs=1e-9)


def test_softmax_bounds_are_bernsteins_where_they_pay_and_hoeffdings_elsewhere() -> None:
    for n, bernstein in [(400, False), (20_000, True)]:
        mean = torch.tensor([0.7, 0.3], dtype=torch.float64)
        variance, tail = torch.full_like(mean, 0.01), 0.05 / 4
        second = variance * (n - 1) + n * mean.square()
        top, lower, upper = PixelDP(n=n, scores="softmax")._bounds(n * mean, second)
        rest = 7 * math.log(2 / tail) / (3 * (n - 1))
        margin = math.sqrt(2 * 0.01 * math.log(2 / tail) / n) + rest
        if not bernstein:
            margin = math.sqrt(math.log(1 / tail) / (2 * n))
        assert (rest <= 0.025) is bernstein
        assert (top, lower, upper) == (0, pytest.approx(0.7 - margin), pytest.approx(0.3 + margin))


def test_no_radius_exceeds_what_randomized_smoothing_proves_for_as_much_noise() -> None:
    for bound in ("classical", "heterogeneous", "analytic"):
        certifier = PixelDP(n=1_000, alpha=0.001, bound=bound)  # type: ignore[arg-type]
        for count in (600, 800, 990, 1_000):
            counts = torch.tensor([count, 1_000 - count]).double()
            _, lower, upper = certifier._bounds(counts, counts)
            assert certifier.radius(lower, upper, 1 / 0.5) <= Smoothing(0.5, n=1_000).radius_of(count)


def test_the_radius_is_the_reach_over_how_far_the_layer_moves() -> None:
    for model, ball in [
        (network(attack_size=0.4), "L2"),
        (network(noise="laplace", attack_norm="L1", mean=[0.4], std=[0.3]), "L1"),
        (network(attack_norm="L1"), "L1"),
        (heterogeneous_noise_cnn((1, 8, 8), 4, redistribution=[1.0 + k for k in range(32)], hidden=16), "L2"),
    ]:
        certifier = PixelDP(ball, n=300, bound="heterogeneous")
        found = certifier.certify(model, images(2), seed=0)
        p, q, moves = (found.evidence[name][0].item() for name in ("lower", "upper", "moves"))
        if model.noise.scales.numel() == 1:
            assert moves * float(model.noise.scales) == pytest.approx(1, rel=1e-5)  # sensitivity 1 by construction
        reach = laplace_reach(p, q) if model.noise.law == "laplace" else gaussian_reach(p, q, "heterogeneous")
        assert float(found.radii[0]) == pytest.approx(reach / moves)


def test_weights_that_moved_since_change_the_radius() -> None:
    """The sensitivity is measured on the weights there are, not believed of the construction."""
    model, certifier = half_space(torch.eye(4), torch.ones(4)), PixelDP(n=200)
    once = certifier.moves(model)
    model.before[1].weight.data.mul_(3)
    assert certifier.moves(model) == pytest.approx(3 * once)
    model.noise.scales.mul_(6)
    assert certifier.moves(model) == pytest.approx(once / 2)


# What it refuses


class Frozen(NoiseLayer):
    """The published mistake: one draw for ever."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1


def _hooked() -> NoisyNetwork:
    model = network()
    model.noise.register_forward_hook(lambda _module, inputs, _output: inputs[0])
    return model


def _replaced() -> NoisyNetwork:
    model = network()
    model.noise.forward = lambda x: x  # type: ignore[method-assign]
    return model


def _frozen() -> NoisyNetwork:
    model = network()
    model.noise = Frozen("gaussian", 0.3)
    return model


def _silent() -> NoisyNetwork:
    model = network()
    model.noise.scales.zero_()
    return model


def _normed() -> NoisyNetwork:
    model = network()
    model.before.append(nn.BatchNorm2d(32))
    return model


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), "has no noise layer behind layers of known sensitivity"),
        (_frozen(), "the noise layer is a changed one"),
        (_hooked(), "the noise layer is a changed one"),
        (_replaced(), "the noise layer is a changed one"),
        (_silent(), "must be positive and finite"),
        (_normed(), "a BatchNorm2d, whose sensitivity is not known"),
    ],
)
def test_models_whose_noise_is_not_that_of_the_bound_are_refused(model: nn.Module, complaint: str) -> None:
    with pytest.raises(BadValue, match=complaint):
        PixelDP(n=100).certify(model, images(1), seed=0)


def test_laplace_noise_certifies_no_l2_ball() -> None:
    with pytest.raises(BadValue, match="norm='L2' cannot be certified by Laplace noise"):
        PixelDP("L2").certify(network(noise="laplace", attack_norm="L1"), images(1), seed=0)


def test_a_rest_that_couples_rows_is_refused() -> None:
    model = half_space(torch.eye(4), torch.ones(4))
    model.after = nn.Sequential(Then(lambda h: h - h.mean(0)))
    with pytest.raises(BadValue, match="depends on the other inputs of its batch"):
        PixelDP(n=100).certify(model, images(2, 1, 2, 2), seed=0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"norm": "Linf"},
        {"n": 1},
        {"alpha": 0.0},
        {"alpha": 1.0},
        {"scores": "logits"},
        {"bound": "tight"},
        {"batch_size": 0},
    ],
)
def test_settings_outside_their_range_are_refused_by_name(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(BadValue, match=f"{name}="):
        PixelDP(**wrong)


@pytest.mark.parametrize("value", [-0.01, 1.01, math.nan])
def test_inputs_outside_the_unit_range_are_refused(value: float) -> None:
    with pytest.raises(BadValue, match=r"must lie in \[0, 1\]"):
        PixelDP(n=100).certify(network(), torch.full((1, 1, 8, 8), value), seed=0)


# The promises of the implementation


@pytest.mark.parametrize("law", ["gaussian", "laplace"])
def test_it_draws_the_noise_of_the_bound_anew_in_every_pass(law: Any) -> None:
    """Kolmogorov-Smirnov with false alarms of 1e-6; a tenth less noise is found."""
    seen: list[Tensor] = []

    def record(h: Tensor) -> Tensor:
        seen.append(h.clone())
        return h[:, :2]

    model = half_space(torch.eye(4), torch.ones(4), law, 0.3)
    model.after = nn.Sequential(Then(record))
    PixelDP("L1", n=5_050).certify(model, torch.full((1, 1, 2, 2), 0.5), seed=0)
    noise = torch.cat(seen)[-5_050:].double()
    for factor, same in [(1.0, True), (0.9, False)]:
        cdf = (norm if law == "gaussian" else laplace).cdf
        found = kstest(factor * noise.flatten().numpy(), cdf, args=(0, 0.3))
        assert bool(found.pvalue > 1e-6) is same
    assert len(noise.unique(dim=0)) == 5_050


@pytest.mark.parametrize("scores", ["counts", "softmax"])
def test_the_result_does_not_depend_on_batch_size_or_sharding(scores: Any) -> None:
    model, x = network(), images(4)
    certifier = PixelDP(n=230, scores=scores)
    whole = certifier.certify(model, x, seed=7)
    for batch_size in (1, 100, 250, 10_000):
        other = replace(certifier, batch_size=batch_size).certify(model, x, seed=7)
        torch.testing.assert_close(other.radii, whole.radii, rtol=1e-4, atol=1e-5)
    parts = [
        certifier.certify(model, x[part], seed=7, index=part) for part in (torch.tensor([3, 1]), torch.tensor([0, 2]))
    ]
    assert torch.equal(join(parts).radii, whole.radii)
    assert not torch.equal(certifier.certify(model, x, seed=8).evidence["lower"], whole.evidence["lower"])


def test_the_model_and_the_global_stream_are_left_as_they_were() -> None:
    model = network().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stream = torch.get_rng_state()
    PixelDP(n=100).certify(model, images(2), seed=0)
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("scores", ["counts", "softmax"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_certify_nothing(value: float, scores: Any) -> None:
    model = half_space(torch.eye(4), torch.ones(4))
    model.after = nn.Sequential(Then(lambda h: torch.tensor([1.0, 0.0, value]).expand(len(h), 3)))
    found = PixelDP(n=500, scores=scores).certify(model, images(2, 1, 2, 2), seed=0)
    assert found.labels.tolist() == [ABSTAIN] * 2


def test_inputs_on_the_boundary_are_abstained_from() -> None:
    model = half_space(torch.eye(4), torch.ones(4))
    found = PixelDP(n=400).certify(model, torch.full((30, 1, 2, 2), 0.5), seed=0)
    # Each label would be wrong with probability 0.05 at most.
    assert int((~found.abstained).sum()) <= binom.ppf(1 - 1e-6, 30, 0.05)


def test_the_conditions_say_what_must_hold() -> None:
    text = "\n".join(PixelDP(n=100).certify(network(), images(1), seed=0).conditions)
    for words in ("fresh draws", "gaussian noise", "drawn anew", "scales of the noise", "0.05", "simultaneous", "real"):
        assert words in text


def test_stored_certificates_are_checked_against_their_evidence(tmp_path: Path) -> None:
    certifier = PixelDP(n=200)
    found = certifier.certify(network(), images(5), seed=0)
    assert float(found.radii.max()) > 0
    targets = torch.zeros(5, dtype=torch.int64)
    path = tmp_path / "certificates.json"
    CertificateFile(found, targets, certifier, 0, "0" * 64, "code").save(path)
    loaded = CertificateFile.load(path).certificates
    assert all(torch.equal(loaded.evidence[name], values) for name, values in found.evidence.items())
    written = path.read_text()
    radius = json.dumps(found.radii.max().item())
    assert radius in written
    path.write_text(written.replace(radius, json.dumps(1.01 * found.radii.max().item())))
    with pytest.raises(TrivetError, match="do not follow"):
        CertificateFile.load(path)


def test_no_inputs_give_no_certificates_and_progress_counts_inputs() -> None:
    told: list[float] = []
    assert len(PixelDP(n=100).certify(network(), torch.zeros(0, 1, 8, 8), seed=0)) == 0
    PixelDP(n=100).certify(network(), images(3), seed=0, advance=lambda amount=1, _="": told.append(amount))
    assert sum(told) == 3


def test_recipes_can_name_it() -> None:
    assert build("certify", {"name": "pixeldp", "norm": "L1", "n": 500}) == PixelDP("L1", n=500)
    assert isinstance(pixeldp_cnn((1, 8, 8), 10, hidden=4), NoisyNetwork)


def test_a_short_training_reaches_accuracy_and_certified_accuracy() -> None:
    """Two blobs of images, 30 steps: nearly all right, most with a radius."""
    torch.manual_seed(0)
    labels = torch.arange(128) % 2
    x = (0.25 + 0.5 * labels.view(-1, 1, 1, 1) + 0.2 * torch.rand(128, 1, 8, 8) - 0.1).clamp(0, 1)
    model = pixeldp_cnn((1, 8, 8), 2, hidden=16, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    found = PixelDP(n=500).certify(model, x[:20], seed=0)
    assert float((found.labels == labels[:20]).float().mean()) >= 0.9
    assert float((found.radii > 0.05).float().mean()) >= 0.5
