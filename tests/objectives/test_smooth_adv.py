"""SmoothAdv: the loss its attack raises, the step it takes, the set it stays in, and the noise it shares."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from trivet.data.dataset import Batch
from trivet.errors import BadValue
from trivet.objectives.gaussian import Gaussian
from trivet.objectives.objective import Progress
from trivet.objectives.smooth_adv import SmoothAdv
from trivet.threats.l2 import L2


def smoothed_loss(model, labels, views):
    """-log of the mean probability of the label over the views [B, V, ...], written out."""
    mean = torch.stack([model(views[:, v]).double().softmax(1) for v in range(views.shape[1])]).mean(0)
    return -mean[torch.arange(len(labels)), labels].log()


@pytest.fixture
def trained(mlp, batch, progress) -> nn.Module:
    optimizer = torch.optim.Adam(mlp.parameters(), 0.01)
    for step in range(80):
        optimizer.zero_grad()
        Gaussian(0.1, samples=4)(mlp, batch, Progress(step, 80, 0.0, 0)).per_example.mean().backward()
        optimizer.step()
    return mlp


@dataclass(frozen=True)
class Descending(SmoothAdv):
    """The wrong sign."""

    def inner_loss(self, model, batch):
        rising = super().inner_loss(model, batch)
        return lambda logits: -rising(logits)


def gains(kind, model, batch, progress):
    """By how much the attack raises each record's loss under its own draws."""
    objective = kind(L2(0.5), steps=4, sigma=0.25, samples=3, eps_ramp=0.0)
    noisy = Gaussian(0.25, 3).perturb(model, batch, progress)
    with torch.no_grad():
        return smoothed_loss(model, batch.labels, objective.perturb(model, batch, progress)) - smoothed_loss(
            model, batch.labels, noisy
        )


def test_the_attack_raises_the_loss_of_the_smoothed_classifier_and_a_wrong_sign_is_seen(
    trained, batch, progress
) -> None:
    assert gains(SmoothAdv, trained, batch, progress).min() > 0
    assert gains(Descending, trained, batch, progress).max() < 0


def test_one_step_goes_along_the_gradient_of_the_log_of_the_mean_probability(mlp, progress) -> None:
    x = 0.5 + 0.05 * torch.rand(8, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    batch = Batch(x, torch.arange(8) % 4, torch.arange(8))
    objective = SmoothAdv(L2(0.3), steps=1, step_size=0.1, sigma=1.0, samples=3, eps_ramp=0.0)
    noisy = Gaussian(1.0, 3).perturb(mlp, batch, progress)
    point = x.clone().requires_grad_()
    loss = smoothed_loss(mlp, batch.labels, noisy + (point - x)[:, None])
    (gradient,) = torch.autograd.grad(loss.sum(), point)
    expected = 0.1 * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    delta = objective.perturb(mlp, batch, progress) - noisy
    torch.testing.assert_close(delta, expected[:, None].expand_as(delta), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("radius", [0.25, 2.0])
def test_the_attacked_input_stays_in_the_ball_and_in_the_box_and_the_noise_leaves_it(
    trained, batch, progress, radius
) -> None:
    objective = SmoothAdv(L2(radius), steps=5, sigma=0.5, samples=2, eps_ramp=0.0)
    views = objective.perturb(trained, batch, progress)
    noise = Gaussian(0.5, 2).perturb(trained, batch, progress) - batch.inputs[:, None]
    attacked = views - noise
    length = (attacked[:, 0] - batch.inputs).flatten(1).norm(dim=1)
    assert length.max() <= radius + 1e-5
    assert length.min() > radius / 4
    assert attacked.min() >= -1e-6
    assert attacked.max() <= 1 + 1e-6
    assert views.min() < 0
    assert views.max() > 1
    assert not views.requires_grad


def test_every_view_of_a_record_has_the_same_attack_and_the_noise_of_gaussian_training(mlp, batch, progress) -> None:
    objective = SmoothAdv(L2(0.5), steps=3, sigma=0.5, samples=3, eps_ramp=0.0)
    delta = objective.perturb(mlp, batch, progress) - Gaussian(0.5, 3).perturb(mlp, batch, progress)
    torch.testing.assert_close(delta, delta[:, :1].expand_as(delta), rtol=0, atol=1e-6)
    assert delta.abs().amax() > 0.01


@pytest.mark.parametrize("settings", [{"threat": L2(0.0)}, {"threat": L2(0.5), "eps_ramp": 0.5}], ids=["eps", "ramp"])
def test_at_radius_zero_it_is_gaussian_augmentation(mlp, batch, settings) -> None:
    start = Progress(step=0, steps=10, epoch=0.0, seed=7)
    ours = SmoothAdv(sigma=0.3, samples=2, **settings)(mlp, batch, start).per_example
    assert torch.equal(ours, Gaussian(0.3, 2)(mlp, batch, start).per_example)


def test_the_ramp_lets_the_radius_grow_in_proportion(mlp, batch) -> None:
    reach = []
    for step in (10, 25, 50, 99):
        progress = Progress(step, 100, 0.0, 0)
        objective = SmoothAdv(L2(0.4), steps=2, eps_ramp=0.5, sigma=0.2, samples=2)
        delta = objective.perturb(mlp, batch, progress) - Gaussian(0.2, 2).perturb(mlp, batch, progress)
        reach.append(float(delta[:, 0].flatten(1).norm(dim=1).max()))
    assert reach == pytest.approx([0.08, 0.2, 0.4, 0.4], rel=0.02)


def test_without_a_gradient_it_goes_in_random_directions_of_its_own_for_each_record(mlp, progress) -> None:
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.zero_()
    batch = Batch(torch.full((6, 2, 4, 4), 0.5), torch.zeros(6, dtype=torch.int64), torch.arange(6))
    objective = SmoothAdv(L2(0.3), steps=1, sigma=0.0, samples=1, eps_ramp=0.0)
    delta = (objective.perturb(mlp, batch, progress)[:, 0] - 0.5).flatten(1)
    torch.testing.assert_close(delta.norm(dim=1), torch.full((6,), 0.3), rtol=1e-4, atol=0)
    cosines = (delta @ delta.T / 0.09).fill_diagonal_(0.0)
    assert cosines.abs().max() < 0.95  # 32 dimensions: false alarm below 1e-9


def test_a_record_without_a_gradient_moves_among_records_that_have_one(progress) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(32, 4), nn.ReLU())
    with torch.no_grad():
        net[1].weight.copy_(torch.linspace(0.5, 1.5, 128).view(4, 32))
        net[1].bias.fill_(-18.0)  # all units are off on dark images, and all on for bright ones
    batch = Batch(torch.tensor([0.3, 0.9]).view(2, 1, 1, 1).expand(2, 2, 4, 4), torch.tensor([0, 1]), torch.arange(2))
    objective = SmoothAdv(L2(0.2), steps=1, sigma=0.0, samples=1, eps_ramp=0.0)
    delta = (objective.perturb(net, batch, progress)[:, 0] - batch.inputs).flatten(1)
    torch.testing.assert_close(delta.norm(dim=1), torch.tensor([0.2, 0.2]), rtol=1e-4, atol=0)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(BadValue, match="sigma=-1"):
        SmoothAdv(L2(0.1), sigma=-1)
    with pytest.raises(BadValue, match="samples=0"):
        SmoothAdv(L2(0.1), sigma=1, samples=0)
    with pytest.raises(BadValue, match="steps=0"):
        SmoothAdv(L2(0.1), sigma=1, steps=0)
