"""MACER by hand with SciPy's quantiles, where its hinge is off, and that certainty makes no NaN."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import norm
from torch import nn

from trivet.errors import BadValue
from trivet.objectives.macer import Macer, radius_hinge
from trivet.objectives.objective import Progress


def hinge_by_hand(logits, label, sigma, gamma, beta):
    """L_R of one record's logits [V][K], with plain Python arithmetic."""
    mean = [0.0] * len(logits[0])
    for row in logits:
        powers = [math.exp(beta * (z - max(row))) for z in row]
        mean = [m + p / sum(powers) / len(logits) for m, p in zip(mean, powers, strict=True)]
    first, second = sorted(range(len(mean)), key=lambda c: -mean[c])[:2]
    if first != label:
        return 0.0
    xi = norm.ppf(mean[first]) - norm.ppf(mean[second])
    return sigma / 2 * (gamma - xi) if math.isfinite(xi) and abs(xi) <= gamma else 0.0


def test_a_small_case_by_hand() -> None:
    """Two views voting (0.8, 0.2) and (0.6, 0.4): G = (0.7, 0.3), xi = 2 Phi^{-1}(0.7)."""
    logits = torch.tensor([[[0.8, 0.2], [0.6, 0.4]]], dtype=torch.float64).log()
    found = radius_hinge(logits, torch.tensor([0]), sigma=0.5, gamma=8.0, beta=1.0)
    assert float(found) == pytest.approx(0.25 * (8 - 2 * norm.ppf(0.7)), rel=1e-9)
    assert float(radius_hinge(logits, torch.tensor([1]), sigma=0.5, beta=1.0)) == 0.0


@pytest.mark.parametrize("gamma", [1.0, 8.0])
def test_the_hinge_is_the_formula_for_right_wrong_and_certain_records(gamma) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = 0.3 * torch.randn(60, 5, 4, generator=generator, dtype=torch.float64)
    logits[::3] += (
        torch.nn.functional.one_hot(torch.arange(20) % 4, 4)[:, None] * torch.linspace(0, 3, 20)[:, None, None]
    )
    labels = logits.mean(1).argmax(1)
    labels[1::3] = (labels[1::3] + 1) % 4
    expected = [hinge_by_hand(z.tolist(), int(y), 0.5, gamma, 16.0) for z, y in zip(logits, labels, strict=True)]
    found = radius_hinge(logits, labels, 0.5, gamma, 16.0)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-9)
    assert 5 < sum(value > 0 for value in expected) < 40  # both sides of each condition are met


def test_the_loss_is_the_cross_entropy_of_the_mean_probability_and_the_weighted_hinge(mlp, batch, progress) -> None:
    objective = Macer(sigma=0.5, samples=3, lam=6.0, defer=0.0)
    views = objective.perturb(mlp, batch, progress)
    found = objective.losses(mlp, batch, views, progress).per_example
    with torch.no_grad():
        for record, label in enumerate(batch.labels.tolist()):
            logits = mlp(views[record]).double()
            classification = -math.log(float(logits.softmax(1).mean(0)[label]))
            hinge = hinge_by_hand(logits.tolist(), label, 0.5, 8.0, 16.0)
            assert float(found[record]) == pytest.approx(classification + 6.0 * hinge, rel=1e-4)


def test_until_it_is_no_longer_deferred_only_the_classification_counts(mlp, batch) -> None:
    deferred, without = Macer(sigma=0.5, defer=0.4), Macer(sigma=0.5, lam=0.0, defer=0.0)
    early, late = Progress(39, 100, 0.0, 1), Progress(40, 100, 0.0, 1)
    assert torch.equal(deferred(mlp, batch, early).per_example, without(mlp, batch, early).per_example)
    assert not torch.allclose(deferred(mlp, batch, late).per_example, without(mlp, batch, late).per_example)


def test_descending_the_hinge_raises_the_soft_radius() -> None:
    logits = 0.1 * torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(1))
    labels = (16 * logits).softmax(2).mean(1).argmax(1)
    before = radius_hinge(logits.requires_grad_(), labels, 0.5)
    (gradient,) = torch.autograd.grad(before.sum(), logits)
    after = radius_hinge(logits.detach() - 0.01 * gradient / gradient.norm(), labels, 0.5)
    assert (before > 0).all()
    assert (after < before).all()


@pytest.mark.parametrize("scale", [0.0, 1e4], ids=["undecided", "certain"])
def test_undecided_and_certain_predictions_give_finite_losses_and_gradients(batch, progress, scale) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(32, 4))
    with torch.no_grad():
        net[1].weight.mul_(scale)
        net[1].bias.mul_(scale)
    per_example = Macer(sigma=0.25, samples=4, defer=0.0)(net, batch, progress).per_example
    per_example.mean().backward()
    assert per_example.isfinite().all()
    assert net[1].weight.grad.isfinite().all()


@pytest.mark.parametrize("wrong", [{"lam": -1.0}, {"gamma": 0.0}, {"beta": 0.0}, {"defer": 1.0}, {"samples": 0}])
def test_wrong_settings_are_refused(wrong) -> None:
    with pytest.raises(BadValue, match=f"{next(iter(wrong))}="):
        Macer(sigma=0.5, **wrong)
