"""PGD adversarial training against the textbook loop, and its reduction to plain training."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trivet.data.dataset import Batch
from trivet.objectives.objective import Progress
from trivet.objectives.pgd_at import PgdAt
from trivet.objectives.plain import Plain
from trivet.threats.linf import Linf


def textbook_pgd(model, x, y, start, eps, steps, step_size):
    """Madry's loop, on a copy in eval mode, with `backward` through everything."""
    model = copy.deepcopy(model).eval()
    point = start.clone()
    for _ in range(steps):
        point.requires_grad_()
        F.cross_entropy(model(point), y).backward()
        point = point.detach() + step_size * point.grad.sign()
        point = torch.min(torch.max(point, x - eps), x + eps).clamp(0, 1)
    return point


def test_the_parameter_gradient_is_that_of_the_textbook_loop_on_a_net_with_batchnorm(
    convnet, batch, progress, gradients
) -> None:
    objective = PgdAt(Linf(0.1), steps=4, step_size=0.04)
    start = objective.start(objective.threat, batch, progress)
    expected_input = textbook_pgd(convnet, batch.inputs, batch.labels, start, 0.1, 4, 0.04)
    reference = copy.deepcopy(convnet)
    expected = gradients(reference, F.cross_entropy(reference(expected_input), batch.labels, reduction="none"))

    assert torch.allclose(objective.perturb(convnet, batch, progress), expected_input, atol=1e-6)
    found = gradients(convnet, objective(convnet, batch, progress).per_example)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(convnet.buffers(), reference.buffers(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)  # the attack moved no running statistics, the update did


def test_reading_a_weight_that_is_computed_in_training_mode_moves_nothing(mlp, batch, progress) -> None:
    """Spectral normalisation iterates whenever its weight is read in train mode; the attack reads in eval mode."""
    nn.utils.parametrizations.spectral_norm(mlp[1])
    before = copy.deepcopy(mlp.state_dict())
    PgdAt(Linf(0.1), steps=2).perturb(mlp, batch, progress)
    assert all(torch.equal(tensor, before[name]) for name, tensor in mlp.state_dict().items())
    assert mlp[1].training
    mlp(batch.inputs)
    assert not torch.equal(mlp[1].parametrizations.weight[0]._u, before["1.parametrizations.weight.0._u"])


def test_the_step_shrinks_with_the_ramp(mlp, batch) -> None:
    objective, quarter = PgdAt(Linf(0.4), steps=1, step_size=0.02, eps_ramp=0.8), Progress(20, 100, 0.0, seed=0)
    batch = Batch(0.5 + 0.0 * batch.inputs, batch.labels, batch.index)  # far from the ends of [0, 1]
    start = objective.start(objective.threat.scaled(0.25), batch, quarter)
    moved = (objective.perturb(mlp, batch, quarter) - start).abs()
    assert float(moved.median()) == pytest.approx(0.25 * 0.02, rel=1e-3)


def test_at_radius_zero_it_is_plain_training(mlp, batch, progress) -> None:
    adversarial = PgdAt(Linf(0.0))(mlp, batch, progress).per_example
    assert torch.equal(adversarial, Plain()(mlp, batch, progress).per_example)


@pytest.mark.parametrize("steps", [1, 10])
def test_the_default_step_is_two_and_a_half_radii_over_the_steps(steps) -> None:
    assert PgdAt(Linf(0.1), steps=steps).step_length == pytest.approx(0.25 / steps)
    assert PgdAt(Linf(0.1), steps=steps, step_size=0.01).step_length == 0.01
