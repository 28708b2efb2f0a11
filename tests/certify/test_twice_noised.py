"""Certificates of twice-noised networks against exact radii, brute force, and noise that is not that of the bound."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from trivet.certify.twice_noised import TwiceNoisedCertificate
from trivet.errors import BadValue
from trivet.models.mlp import mlp
from trivet.models.noise_layer import NoiseLayer
from trivet.models.normalize import Normalize
from trivet.models.twice_noised import TwiceNoised, twice_noised_cnn, twice_noised_mlp

SHAPE = (1, 6, 6)


class Sign(nn.Module):
    """Logits of two classes from one number: its sign decides."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([-x, x], 1)


def scalar(weight: float, threshold: float, input_scale: float, latent_scale: float) -> TwiceNoised:
    """A one-pixel image, above `threshold` or not; by symmetry its most frequent answer changes just there."""
    first = nn.Linear(1, 1)
    nn.init.constant_(first.weight, weight)
    nn.init.constant_(first.bias, -weight * threshold)
    noises = (NoiseLayer("laplace", input_scale), NoiseLayer("laplace", latent_scale))
    return TwiceNoised(noises[0], nn.Identity(), first, noises[1], Sign())


@pytest.mark.parametrize("scales", [(0.1, 1.0), (0.3, 0.3), (1.0, 0.1)])
@pytest.mark.parametrize("norm", ["Linf", "L1"])
def test_radii_never_exceed_the_exact_distance_to_the_change_of_answer(norm, scales) -> None:
    """120 certificates, each wrong with probability 1e-9 at most."""
    x = torch.linspace(0, 1, 20).view(-1, 1, 1, 1)
    certifier = TwiceNoisedCertificate(norm=norm, n=400, alpha=1e-9)
    found = certifier.certify(scalar(2.0, 0.4, *scales), x, seed=0)
    exact = (x.flatten() - 0.4).abs().double()
    assert (found.radii <= exact).all()
    named = ~found.abstained
    assert torch.equal(found.labels[named], (x.flatten() > 0.4).long()[named])
    assert (found.radii > 0).sum() >= 3


def test_unanimous_votes_have_the_radius_of_the_formula() -> None:
    """p = a^(1/n) at a = alpha / 2K; each noise alone would give R = ln(p / (1 - p)) / 2 * b / S."""
    model, x = scalar(100.0, -10.0, 0.25, 5.0), torch.full((1, 1, 1, 1), 0.5)
    found = TwiceNoisedCertificate(n=200, alpha=0.04).certify(model, x, seed=0)
    p = 0.01 ** (1 / 200)
    # The input's rate is 1 / 0.25 = 4, the layer's 100 / 5 = 20: the input's noise hides more.
    assert float(found.radii) == pytest.approx(math.log(p / (1 - p)) / 2 / 4, rel=1e-9)
    assert float(found.evidence["latent_rate"]) == pytest.approx(20, rel=1e-6)


@pytest.mark.parametrize("norm", ["Linf", "L1"])
@pytest.mark.parametrize("make", [twice_noised_mlp, twice_noised_cnn])
def test_the_first_layer_moves_no_further_than_stated(make, norm) -> None:
    model = make(SHAPE, 3, input_scale=0.2, latent_scale=0.5, mean=[0.5], std=[0.25]).double()
    x = torch.rand(1, *SHAPE, dtype=torch.float64)
    certifier = TwiceNoisedCertificate(norm=norm, n=100)
    found = certifier.certify(copy.deepcopy(model).float(), x.float(), seed=0)
    assert float(found.evidence["input_rate"]) == pytest.approx((36 if norm == "Linf" else 1) / 0.2)
    if norm == "Linf":
        moves = torch.sign(torch.randn(500, *SHAPE, dtype=torch.float64))
    else:
        moves = torch.eye(36, dtype=torch.float64).view(36, *SHAPE)
    with torch.no_grad():
        reached = (model.latent(x + moves) - model.latent(x)).flatten(1).abs().sum(1).max() / 0.5
    assert float(reached) <= float(found.evidence["latent_rate"])
    if norm == "L1":
        assert float(found.evidence["latent_rate"]) == pytest.approx(float(reached), rel=1e-4)


def test_certificates_depend_on_seed_and_position_and_not_on_the_batch_size() -> None:
    model, x = twice_noised_mlp(SHAPE, 3, 0.3, 0.3), torch.rand(4, *SHAPE)
    one, other = (TwiceNoisedCertificate(n=250, batch_size=size).certify(model, x, seed=1) for size in (100, 1000))
    torch.testing.assert_close(one.evidence["lower"], other.evidence["lower"], rtol=0, atol=0)
    last = TwiceNoisedCertificate(n=250).certify(model, x[3:], seed=1, index=torch.tensor([3]))
    assert float(last.evidence["lower"]) == float(one.evidence["lower"][3])
    again = TwiceNoisedCertificate(n=250).certify(model, x, seed=2)
    assert not torch.equal(again.evidence["lower"], one.evidence["lower"])


def test_votes_are_those_of_the_network_itself() -> None:
    """Rates of 20,000 votes and of as many passes of the model: within 7 deviations, odds below 1e-11."""
    model, x = (
        twice_noised_mlp(SHAPE, 2, 0.5, 0.5, generator=torch.Generator().manual_seed(0)).eval(),
        torch.rand(1, *SHAPE),
    )
    n = 20_000
    votes = TwiceNoisedCertificate(n=n)._votes(model, x[0], torch.Generator().manual_seed(1))
    with torch.no_grad():
        answers = model(x.expand(n, *SHAPE)).argmax(1)
    rate = float((answers == 0).float().mean())
    assert sum(votes) == n
    assert 0.02 < rate < 0.98
    assert votes[0] / n == pytest.approx(rate, abs=7 * math.sqrt(0.5 / n))


def test_noise_is_fresh_for_every_record_in_both_modes() -> None:
    model, x = twice_noised_mlp(SHAPE, 3), torch.rand(1, *SHAPE)
    for training in (True, False):
        logits = model.train(training)(x.expand(2, *SHAPE))
        assert not torch.equal(logits[0], logits[1])
        assert not torch.equal(model(x), model(x))


def test_what_follows_from_the_evidence_is_recognised_and_more_is_not() -> None:
    model, x = twice_noised_mlp(SHAPE, 3, 0.3, 0.3), torch.rand(4, *SHAPE)
    certifier = TwiceNoisedCertificate(n=300, alpha=0.05)
    found = certifier.certify(scalar(100.0, -10.0, 0.25, 5.0), x[:, :, :1, :1], seed=0)
    assert certifier.follows(found)
    object.__setattr__(found, "radii", found.radii * 1.01)
    assert not certifier.follows(found)
    assert not TwiceNoisedCertificate(n=300, alpha=0.01).follows(certifier.certify(model, x, seed=0))


def frozen(model: TwiceNoised) -> None:
    noise = model.input_noise.draw(torch.zeros(1, *SHAPE))
    model.input_noise.forward = lambda x: x + noise  # type: ignore[method-assign]


def shrunk(model: TwiceNoised) -> None:
    model.latent_noise.register_forward_hook(lambda _module, inputs, output: inputs[0] + (output - inputs[0]) / 2)


def silent(model: TwiceNoised) -> None:
    model.latent_noise.scales.zero_()


def gaussian(model: TwiceNoised) -> None:
    model.input_noise = NoiseLayer("gaussian", 0.1)


def stretched(model: TwiceNoised) -> None:
    model.normalize = nn.Tanh()


@pytest.mark.parametrize("change", [frozen, shrunk, silent, gaussian, stretched])
def test_noise_that_is_not_that_of_the_bound_is_refused(change) -> None:
    model = twice_noised_mlp(SHAPE, 3)
    change(model)
    with pytest.raises(BadValue):
        TwiceNoisedCertificate(n=100).certify(model, torch.rand(1, *SHAPE), seed=0)


def test_other_networks_and_settings_are_refused() -> None:
    with pytest.raises(BadValue, match="train a twice_noised_mlp"):
        TwiceNoisedCertificate().certify(mlp(SHAPE, 3), torch.rand(1, *SHAPE), seed=0)
    for wrong in ({"norm": "L2"}, {"n": 1}, {"alpha": 0.0}, {"batch_size": 0}):
        with pytest.raises(BadValue, match=next(iter(wrong))):
            TwiceNoisedCertificate(**wrong)
    for wrong in ({"input_scale": 0.0}, {"latent_scale": math.inf}, {"hidden": []}):
        with pytest.raises(BadValue, match=next(iter(wrong))):
            twice_noised_mlp(SHAPE, 3, **wrong)


def test_normalisation_is_known_to_stretch() -> None:
    plain, scaled = scalar(2.0, 0.4, 0.3, 0.3), scalar(2.0, 0.4, 0.3, 0.3)
    scaled.normalize = Normalize([0.0], [0.5])
    x = torch.rand(1, 1, 1, 1)
    rates = [
        float(TwiceNoisedCertificate(n=100).certify(each, x, seed=0).evidence["latent_rate"])
        for each in (plain, scaled)
    ]
    assert rates[1] == pytest.approx(2 * rates[0])
