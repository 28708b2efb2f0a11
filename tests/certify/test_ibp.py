"""Certificates by bounds, as the audit and files use them; IBP's own figures."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from bound_oracles import attacked, images, least_found, mlp, rows_of
from torch import Tensor, nn

from trivet.certify.alpha_crown import AlphaCrown
from trivet.certify.bounds.certifier import BoundCertifier
from trivet.certify.bounds.network import Network
from trivet.certify.certificate_file import CertificateFile
from trivet.certify.certifier import ABSTAIN, Certificates, Certifier, join
from trivet.certify.crown import Crown, CrownIbp
from trivet.certify.ibp import Ibp
from trivet.errors import BadValue, TrivetError
from trivet.methods import build, spec_of

RADII = (0.002, 0.01, 0.03, 0.1)
ALL = (Ibp, CrownIbp, Crown, AlphaCrown)


@pytest.fixture(scope="module")
def model() -> nn.Sequential:
    return mlp(12, 16, 16, 4, seed=3, scale=1.5)


@pytest.fixture(scope="module")
def x() -> Tensor:
    return images(24, 12, seed=4)


@pytest.fixture(scope="module")
def obtained(model: nn.Sequential, x: Tensor) -> dict[type[BoundCertifier], Certificates]:
    return {kind: kind(eps=RADII).certify(model, x) for kind in ALL}


def test_stronger_methods_certify_more_and_never_less(obtained: dict[type[BoundCertifier], Certificates]) -> None:
    for weaker, stronger in itertools.pairwise(ALL):
        assert bool((obtained[weaker].radii <= obtained[stronger].radii).all())
    totals = [float(obtained[kind].radii.sum()) for kind in ALL]
    assert totals[0] < totals[1] < totals[2] <= totals[3]


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
@pytest.mark.parametrize("kind", ALL)
def test_nothing_is_found_inside_certified_balls(
    kind: type[BoundCertifier], norm: str, model: nn.Sequential, x: Tensor
) -> None:
    factor = {"Linf": 1.0, "L2": 3.0, "L1": 8.0}[norm]
    certificates = kind(eps=tuple(factor * eps for eps in RADII), norm=norm).certify(model, x)  # type: ignore[arg-type]
    certified = 0
    for radius in certificates.radii.unique().tolist():
        rows = certificates.radii == radius
        if radius:
            worst = least_found(model, x[rows], radius, norm, rows_of(model, x[rows]), count=100)
            assert bool((worst > 0).all())
            certified += int(rows.sum())
    assert certified > 0


def test_the_oracle_does_find_examples_just_outside(model: nn.Sequential, x: Tensor) -> None:
    """Certifier and attack meet: most balls three times as large hold an adversarial example."""
    radii = Crown(eps=(0.01, 0.02, 0.04, 0.08, 0.16)).certify(model, x).radii
    flipped = [
        bool((attacked(model, x[i : i + 1], 3 * radius, rows_of(model, x[i : i + 1])) < 0).any())
        for i, radius in enumerate(radii.tolist())
        if radius
    ]
    assert sum(flipped) > len(flipped) / 2


def test_radii_are_those_asked_for_and_labels_the_models_own(
    obtained: dict[type[BoundCertifier], Certificates], model: nn.Sequential, x: Tensor
) -> None:
    answers = model(x).argmax(1)
    for kind, certificates in obtained.items():
        assert set(certificates.radii.tolist()) <= {0.0, *RADII}  # exactly: 0.1 in float32 is more than 0.1
        assert torch.equal(certificates.labels, answers.where(certificates.radii > 0, ABSTAIN))
        assert certificates.alpha == 0.0
        assert kind(eps=RADII).follows(certificates)
        margin = certificates.evidence["margin"]
        assert torch.equal(margin > 0, certificates.radii > 0)


def test_a_radius_is_as_good_as_alone(
    model: nn.Sequential, x: Tensor, obtained: dict[type[BoundCertifier], Certificates]
) -> None:
    for eps in RADII:
        alone = Ibp(eps=eps).certify(model, x)
        assert torch.equal(alone.radii > 0, obtained[Ibp].radii >= eps)


def test_ibp_of_one_hidden_layer_is_the_formula(model: nn.Sequential) -> None:
    """(C W2)(mu) + C b2 - |C W2| r, by hand."""
    net, x, eps = mlp(6, 8, 3, seed=1), images(4, 6), 0.05
    W1, b1, W2, b2 = (each.detach().double() for each in (net[0].weight, net[0].bias, net[2].weight, net[2].bias))
    low, high = (x.double() - eps).clamp(0, 1), (x.double() + eps).clamp(0, 1)
    middle, radius = (low + high) / 2 @ W1.T + b1, (high - low) / 2 @ W1.abs().T
    low, high = (middle - radius).relu(), (middle + radius).relu()
    rows = rows_of(net, x).double() @ W2
    expected = ((rows @ ((low + high) / 2)[:, :, None]) - (rows.abs() @ ((high - low) / 2)[:, :, None])).squeeze(2)
    expected = (expected + rows_of(net, x).double() @ b2).amin(1)
    found = Ibp(eps=eps, arithmetic="real").certify(net, x).evidence["margin"]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ALL)
def test_results_do_not_depend_on_batch_size_or_sharding(
    kind: type[BoundCertifier], model: nn.Sequential, x: Tensor
) -> None:
    whole = kind(eps=RADII).certify(model, x[:9])
    cut = kind(eps=RADII, batch_size=2)
    parts = join(
        [cut.certify(model, x[5:9], index=torch.arange(5, 9)), cut.certify(model, x[:5], index=torch.arange(5))]
    )
    assert torch.equal(whole.radii, parts.radii)
    assert torch.equal(whole.labels, parts.labels)
    torch.testing.assert_close(whole.evidence["margin"], parts.evidence["margin"], rtol=1e-4, atol=1e-4)


def test_they_are_about_the_model_and_say_so(obtained: dict[type[BoundCertifier], Certificates]) -> None:
    assert all(kind.about == "model" for kind in ALL)
    for certificates in obtained.values():
        assert "about the model itself" in certificates.conditions[0]
        assert "every float32 evaluation" in certificates.conditions[1]
    assert "real numbers" in Ibp(eps=0.1, arithmetic="real").certify(mlp(3, 2), images(1, 3)).conditions[1]


def test_certificates_are_saved_and_read_again(
    tmp_path: Path, x: Tensor, obtained: dict[type[BoundCertifier], Certificates]
) -> None:
    for kind, certificates in obtained.items():
        certifier = kind(eps=RADII)
        path = tmp_path / f"{kind.__name__}.json"
        CertificateFile(certificates, torch.zeros(len(x), dtype=torch.int64), certifier, 0, "artefact").save(path)
        read = CertificateFile.load(path)
        assert torch.equal(read.certificates.radii, certificates.radii)
        assert spec_of(read.certifier) == spec_of(certifier)


def test_radii_that_do_not_follow_are_noticed(obtained: dict[type[BoundCertifier], Certificates]) -> None:
    certificates = obtained[Ibp]
    assert not Ibp(eps=0.05).follows(certificates)
    assert not Ibp(eps=RADII, norm="L2").follows(certificates)
    assert bool(certificates.abstained.any())
    raised = torch.full_like(certificates.radii, RADII[0])
    forged = Certificates(
        certificates.index,
        certificates.labels.clamp(min=0),
        raised,
        "Linf",
        0.0,
        certificates.conditions,
        certificates.evidence,
    )
    assert not Ibp(eps=RADII).follows(forged)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
@pytest.mark.parametrize("kind", ALL)
def test_networks_that_overflow_get_no_certificate(kind: type[BoundCertifier], value: float) -> None:
    net = mlp(4, 6, 3)
    with torch.no_grad():
        net[0].weight.fill_(value)
    certificates = kind(eps=(1e-6, 0.1)).certify(net, images(3, 4))
    assert certificates.labels.tolist() == [ABSTAIN] * 3
    assert certificates.radii.tolist() == [0.0] * 3


def test_a_bound_above_the_inputs_own_margin_is_an_error(
    model: nn.Sequential, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Network.margins
    monkeypatch.setattr(Network, "margins", lambda *args, **more: right(*args, **more) + 100.0)
    with pytest.raises(TrivetError, match="above the margin of the input itself"):
        Ibp(eps=0.01).certify(model, x)


def test_dropout_and_batch_norm_are_certified_as_in_eval_mode_and_left_as_they_were() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.9), nn.Linear(8, 3)).train()
    with torch.no_grad():
        net[1].running_mean.fill_(0.2)
    x = images(4, 6)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    certificates = Crown(eps=1e-4).certify(net, x)
    assert net.training
    assert all(module.training for module in net)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert torch.equal(certificates.labels, net.eval()(x).argmax(1).where(certificates.radii > 0, ABSTAIN))


def test_progress_is_told_in_inputs(model: nn.Sequential, x: Tensor) -> None:
    told: list[float] = []
    Ibp(eps=0.01, batch_size=5).certify(model, x[:12], advance=told.append)
    assert told == [5, 5, 2]
    assert len(Ibp(eps=0.01).certify(model, x[:0])) == 0


def test_weights_in_float64_can_be_certified_in_real_numbers_only() -> None:
    net, x = mlp(4, 5, 3, dtype=torch.float64), images(3, 4, dtype=torch.float64)
    with pytest.raises(BadValue, match="must be asked of float32 weights"):
        Ibp(eps=0.01).certify(net, x)
    assert len(Ibp(eps=0.01, arithmetic="real").certify(net, x)) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": 0.0}, "must be positive"),
        ({"eps": math.nan}, "must be positive"),
        ({"eps": ()}, "must hold at least one"),
        ({"eps": 0.1, "norm": "L3"}, "norm='L3' must be"),
        ({"eps": 0.1, "arithmetic": "float16"}, "arithmetic='float16' must be"),
        ({"eps": 0.1, "batch_size": 0}, "batch_size=0 must be"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(BadValue, match=message):
        Ibp(**settings)  # type: ignore[arg-type]


def test_inputs_outside_the_pixels_range_are_refused(model: nn.Sequential) -> None:
    with pytest.raises(BadValue, match="must lie in"):
        Ibp(eps=0.1).certify(model, torch.full((1, 12), 1.5))


def test_recipes_name_them() -> None:
    for name, kind in (("ibp", Ibp), ("crown_ibp", CrownIbp), ("crown", Crown), ("alpha_crown", AlphaCrown)):
        certifier = build("certify", {"name": name, "eps": [0.1, 0.2]}, expects=Certifier)
        assert type(certifier) is kind
        assert certifier.radii == (0.2, 0.1)
        assert build("certify", spec_of(certifier)) == certifier
    with pytest.raises(BadValue, match="slopes"):
        build("certify", {"name": "crown", "eps": 0.1, "slopes": ["steep"]})


def test_the_margin_is_below_the_exact_one(x: Tensor) -> None:
    """Of a linear classifier in fractions, at the certified radius."""
    net = mlp(12, 2, seed=5)
    certificates = Ibp(eps=RADII).certify(net, x)
    assert bool((certificates.radii > 0).any())
    weights, biases = (tensor.detach().double() for tensor in (net[0].weight, net[0].bias))
    for i, radius in enumerate(certificates.radii.tolist()):
        if radius:
            sign = 1 if certificates.labels[i] == 0 else -1
            total = sign * (Fraction(float(biases[0])) - Fraction(float(biases[1])))
            for one, other, value in zip(*weights.tolist(), x[i].tolist(), strict=True):
                slope = sign * (Fraction(one) - Fraction(other))
                low, high = max(Fraction(value) - Fraction(radius), 0), min(Fraction(value) + Fraction(radius), 1)
                total += slope * (low if slope > 0 else high)
            assert 0 < Fraction(float(certificates.evidence["margin"][i])) <= total
