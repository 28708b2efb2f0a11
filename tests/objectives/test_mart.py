"""MART against its formula in float64, record by record, and its reductions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from trivet.data.dataset import Batch
from trivet.objectives.mart import Mart
from trivet.threats.linf import Linf


def boosted(q, y):
    others = [q[k] for k in range(len(q)) if k != y]
    return -math.log(q[y]) - math.log(1.0001 - max(others) + 1e-12)


def by_hand(clean, perturbed, labels, beta):
    """The loss of each record from logits, with plain Python arithmetic."""
    losses = []
    for z, z_adv, y in zip(clean.double(), perturbed.double(), labels.tolist(), strict=True):
        p, q = z.softmax(0).tolist(), z_adv.softmax(0).tolist()
        divergence = sum(a * (math.log(a) - math.log(b + 1e-12)) for a, b in zip(p, q, strict=True))
        losses.append(boosted(q, y) + beta * divergence * (1.0000001 - p[y]))
    return torch.tensor(losses)


@pytest.mark.parametrize("beta", [0.0, 5.0])
def test_the_loss_is_the_formula_record_by_record(mlp, batch, progress, beta) -> None:
    objective = Mart(Linf(0.1), beta=beta)
    x_adv = objective.perturb(mlp, batch, progress)
    found = objective.losses(mlp, batch, x_adv, progress).per_example
    with torch.no_grad():
        expected = by_hand(mlp(batch.inputs), mlp(x_adv), batch.labels, beta)
    assert torch.allclose(found, expected, rtol=1e-5)


def test_at_radius_zero_it_is_the_boosted_cross_entropy_of_the_clean_inputs(mlp, batch, progress) -> None:
    found = Mart(Linf(0.0))(mlp, batch, progress).per_example
    with torch.no_grad():
        probabilities = mlp(batch.inputs).double().softmax(1).tolist()
    expected = torch.tensor([boosted(q, y) for q, y in zip(probabilities, batch.labels.tolist(), strict=True)])
    assert torch.allclose(found, expected, rtol=1e-5)


def test_both_predictions_are_differentiated(mlp, batch, progress) -> None:
    """The input gradient at the clean inputs is that of the formula, not zero as a constant target would give."""
    objective = Mart(Linf(0.1))
    x_adv = objective.perturb(mlp, batch, progress)
    x = batch.inputs.clone().requires_grad_()
    per_example = objective.losses(mlp, Batch(x, batch.labels, batch.index), x_adv, progress).per_example
    (gradient,) = torch.autograd.grad(per_example.sum(), x)
    step = 1e-2 * gradient / gradient.norm()
    with torch.no_grad():
        ahead, behind = (
            objective.losses(mlp, Batch(x + s * step, batch.labels, batch.index), x_adv, progress).per_example.sum()
            for s in (1, -1)
        )
    assert gradient.norm() > 0
    assert float(ahead - behind) == pytest.approx(float(2 * (gradient * step).sum()), rel=1e-2)


def test_certain_predictions_right_or_wrong_give_finite_losses_and_gradients(batch, progress) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(32, 4))
    with torch.no_grad():
        net[1].weight.mul_(1e4)
    per_example = Mart(Linf(0.1))(net, batch, progress).per_example
    per_example.mean().backward()
    assert per_example.isfinite().all()
    assert net[1].weight.grad.isfinite().all()
