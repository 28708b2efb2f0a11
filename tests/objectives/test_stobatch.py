"""StoBatch's losses against their Taylor identities, and its networks against the published scales."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trivet.data.dataset import Batch
from trivet.errors import BadValue
from trivet.models.stobatch import StoBatchNetwork, laplace, stobatch_cnn, stobatch_mlp
from trivet.objectives.objective import Progress
from trivet.objectives.stobatch import StoBatchLoss, reconstruction_cost, taylor_cross_entropy

SHAPE = (1, 8, 8)


@pytest.fixture
def records() -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(torch.rand(9, *SHAPE, generator=generator), torch.arange(9) % 4, torch.arange(9))


def silent(model: StoBatchNetwork) -> StoBatchNetwork:
    """The same network without its noise."""
    for noise in (model.input_noise, model.latent_noise, model.label_noise):
        noise.zero_()
    return model


def network(**settings: object) -> StoBatchNetwork:
    """With noise small enough that the clipped last layer is not all at its ends."""
    generator = torch.Generator().manual_seed(2)
    return stobatch_mlp(
        SHAPE, 4, **{"batch_size": 9, "eps_features": 1e4, "norm": "none", "generator": generator, **settings}
    )


def test_the_output_loss_is_the_sigmoid_cross_entropy_to_second_order() -> None:
    """log(1 + e^-u) = log 2 - u/2 + u^2/8 - u^4/192 + ...: within 0.0053 for |u| <= 1, and exact at 0."""
    u = torch.linspace(-1, 1, 201, dtype=torch.float64)[:, None]
    for y in (0.0, 1.0):
        target = torch.full_like(u, y)
        exact = F.binary_cross_entropy_with_logits(u, target, reduction="none").sum(1)
        error = (taylor_cross_entropy(u, target) - exact).abs()
        assert float(error.max()) <= 0.0053
        assert float(error.max()) == pytest.approx(0.00489, abs=1e-4)
        assert float(taylor_cross_entropy(torch.zeros(1, 3), torch.full((1, 3), y))) == pytest.approx(3 * math.log(2))


def test_the_reconstruction_cost_is_its_cross_entropy_to_first_order() -> None:
    """The slope at v = 0 of x log(1 + e^-v) + (1 - x) log(1 + e^v), by automatic differentiation."""
    x, v = torch.rand(5, 7, dtype=torch.float64), torch.zeros(5, 7, dtype=torch.float64, requires_grad=True)
    exact = (x * F.softplus(-v) + (1 - x) * F.softplus(v)).sum(1)
    (slope,) = torch.autograd.grad(exact.sum(), v)
    direction = torch.randn(5, 7, dtype=torch.float64)
    expected = exact.detach() + (slope * direction).sum(1)
    torch.testing.assert_close(reconstruction_cost(x, direction, "paper"), expected)


@pytest.mark.parametrize("form", ["paper", "released"])
def test_grey_images_cost_d_log_2_whatever_the_first_layer(form: str, progress: Progress) -> None:
    """xbar = 1/2 in [-1, 1] is the pixel 0.75."""
    for model in (network(), stobatch_cnn(SHAPE, 4, batch_size=9)):
        noised, hidden = silent(model).noised(torch.full((2, *SHAPE), 0.75))
        cost = reconstruction_cost(noised, model.reconstruct(hidden, noised.shape), form)
        torch.testing.assert_close(cost, torch.full((2,), 64 * math.log(2)))


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 7, 9)])
def test_the_decoder_is_the_transpose_of_the_first_layer(shape: tuple[int, int, int]) -> None:
    """<theta x, h> = <x, theta^T h>."""
    for make in (stobatch_mlp, stobatch_cnn):
        model = silent(make(shape, 4, batch_size=9)).double()
        noised, hidden = model.noised(torch.rand(3, *shape, dtype=torch.float64))
        other = torch.randn_like(hidden)
        rebuilt = model.reconstruct(other, noised.shape)
        assert rebuilt.shape == noised.shape
        torch.testing.assert_close((hidden * other).sum(), (noised * rebuilt).sum())


def test_without_noise_it_is_the_plain_adversarial_taylor_loss(records: Batch, progress: Progress) -> None:
    model, objective = silent(network()), StoBatchLoss(xi=1.5)
    points = objective.perturb(model, records, progress)
    found = objective.losses(model, records, points, progress)
    target = F.one_hot(records.labels, 4)
    scaled = 2 * points - 1
    clean, attacked = (
        taylor_cross_entropy(model.classify(model.first(scaled[:, view].flatten(1))), target) for view in (0, 1)
    )
    expected = (clean + 1.5 * attacked) / 2.5 + found.log["reconstruction"]
    torch.testing.assert_close(found.per_example, expected)
    ordinary = nn.Sequential(model.normalize, nn.Flatten(), model.first, model.rest, model.logits)
    torch.testing.assert_close(
        objective.losses(ordinary, records, points, progress).per_example, (clean + 1.5 * attacked) / 2.5
    )


def test_the_label_noise_pulls_the_last_weights_by_itself_over_m(records: Batch, progress: Progress) -> None:
    model, objective = network(), StoBatchLoss()
    points, weight = objective.perturb(model, records, progress), model.logits.weight
    with_noise = torch.autograd.grad(objective.losses(model, records, points, progress).per_example.mean(), weight)[0]
    noise = model.label_noise.clone()
    model.label_noise.zero_()
    without = torch.autograd.grad(objective.losses(model, records, points, progress).per_example.mean(), weight)[0]
    torch.testing.assert_close(without - with_noise, noise)


def test_the_first_layer_learns_from_reconstruction_alone_and_the_rest_from_labels_alone(
    records: Batch, progress: Progress
) -> None:
    model, objective = network(), StoBatchLoss()
    points = objective.perturb(model, records, progress)
    other = Batch(records.inputs, (records.labels + 1) % 4, records.index)
    gradients = []
    for batch in (records, other):
        model.zero_grad()
        objective.losses(model, batch, points, progress).per_example.sum().backward()
        gradients.append((model.first.weight.grad.clone(), model.logits.weight.grad.clone()))
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert not torch.allclose(gradients[0][1], gradients[1][1])
    assert gradients[0][0].abs().sum() > 0


def test_every_record_of_every_step_carries_the_same_draw(records: Batch) -> None:
    """The flaw itself: differences of noised records are differences of records, bit for bit but for rounding."""
    model = network(eps_features=100.0)
    noised, _ = model.noised(records.inputs)
    scaled = (2 * records.inputs - 1).flatten(1)
    torch.testing.assert_close(noised[1:] - noised[:1], scaled[1:] - scaled[:1], rtol=0, atol=1e-4)
    assert float((noised - scaled).abs().mean()) > 1


def test_attacks_start_at_the_noised_input_and_keep_to_their_size(records: Batch, progress: Progress) -> None:
    objective = StoBatchLoss(size=0.2)
    points = objective.perturb(network(), records, progress)
    assert torch.equal(points[:, 0], records.inputs)
    size = (points[:, 1] - records.inputs).abs().flatten(1).amax(1)
    assert (size <= 0.2).all()
    assert size.max() - size.min() < 1e-6  # one mu for the whole step
    sizes = {
        float((objective.perturb(network(), records, Progress(s, 9, 0.0, 7))[:, 1] - records.inputs).abs().max())
        for s in range(5)
    }
    assert len(sizes) == 5


def test_one_step_of_the_attack_is_the_sign_of_the_gradient_at_the_predicted_label(
    records: Batch, progress: Progress
) -> None:
    model = network()
    points = StoBatchLoss(steps=1, attacks=("ifgsm",)).perturb(model, records, progress)[:, 1]
    x = records.inputs.clone().requires_grad_()
    logits = model(x)
    loss = taylor_cross_entropy(logits, F.one_hot(logits.argmax(1), 4))
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    moved = points - records.inputs
    assert (gradient != 0).any(dim=(1, 2, 3)).all()
    torch.testing.assert_close(moved, moved.abs().max() * gradient.sign())


def test_records_have_the_attack_of_their_index(records: Batch, progress: Progress) -> None:
    model = network()
    ensemble = StoBatchLoss().perturb(model, records, progress)[:, 1]
    for place, name in enumerate(("ifgsm", "mim", "pgd")):
        alone = StoBatchLoss(attacks=(name,)).perturb(model, records, progress)[:, 1]
        torch.testing.assert_close(ensemble[place::3], alone[place::3])
    one, other = (StoBatchLoss(attacks=(name,)).perturb(model, records, progress) for name in ("ifgsm", "pgd"))
    assert not torch.allclose(one, other)


def test_noise_has_the_published_scales() -> None:
    """Delta_R = d (beta + 2) = 64 * 66; for the convolution (4^2 + 2) * 25. Laplace scale = mean absolute value."""
    dense = stobatch_mlp((1, 8, 8), 10, batch_size=10, eps_features=2.0, eps_labels=0.5, hidden=[64])
    assert dense.sensitivity(SHAPE) == 64 * 66
    assert stobatch_cnn((1, 28, 28), 10, batch_size=2499).sensitivity((1, 28, 28)) == 4950
    wide = stobatch_cnn((1, 200, 200), 10, batch_size=10, eps_features=2.0, eps_labels=0.5)
    scale = wide.sensitivity((1, 200, 200)) / 20
    assert wide.sensitivity((1, 200, 200)) == (100**2 + 2) * 25
    # 40,000 draws: the mean of |Lap| within 4 % but for odds of about 1e-15.
    assert float(wide.input_noise.abs().mean()) == pytest.approx(scale, rel=0.04)
    assert float(wide.latent_noise.abs().mean()) == pytest.approx(2 * scale, rel=0.04)
    draws = laplace([100_000], 3.0, torch.Generator().manual_seed(0))
    assert float((draws.abs() > 6.0).float().mean()) == pytest.approx(math.exp(-2), rel=0.06)
    assert abs(float(draws.mean())) < 8 * 3 * math.sqrt(2 / 100_000)
    labels = stobatch_mlp((1, 8, 8), 10, batch_size=10, eps_labels=0.5, hidden=[4000])
    assert float(labels.label_noise.abs().mean()) == pytest.approx(2 * 4000 / (10 * 0.5), rel=0.04)


def test_the_draw_is_saved_with_the_weights_and_no_part_of_them() -> None:
    model = network()
    assert {"input_noise", "latent_noise", "label_noise"} <= set(model.state_dict())
    assert not any("noise" in name for name, _ in model.named_parameters())
    assert torch.isfinite(stobatch_mlp(SHAPE, 4, batch_size=9, eps_features=math.inf)(torch.rand(2, *SHAPE))).all()


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"eps_features": 0.0}, "eps_features"),
        ({"eps_labels": -1.0}, "eps_labels"),
        ({"hidden": []}, "hidden="),
    ],
)
def test_impossible_networks_are_refused(settings: dict[str, object], complaint: str) -> None:
    with pytest.raises(BadValue, match=complaint):
        network(**settings)


@pytest.mark.parametrize("wrong", [{"xi": -1.0}, {"size": -0.1}, {"steps": 0}, {"attacks": ()}])
def test_impossible_objectives_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(BadValue, match=next(iter(wrong))):
        StoBatchLoss(**wrong)
