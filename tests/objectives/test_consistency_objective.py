"""Consistency regularization against its formula in nats, and where it vanishes."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from trivet.errors import BadValue
from trivet.objectives.consistency import Consistency, inconsistency
from trivet.objectives.gaussian import Gaussian


def test_the_penalty_is_the_formula_with_the_distributions_of_torch() -> None:
    logits = 2 * torch.randn(40, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mean = Categorical(probs=logits.softmax(2).mean(1))
    divergence = torch.stack([kl_divergence(mean, Categorical(logits=logits[:, v])) for v in range(3)]).mean(0)
    torch.testing.assert_close(inconsistency(logits, 5.0, 0.5), 5.0 * divergence + 0.5 * mean.entropy())


def test_the_divergence_is_never_negative_and_is_zero_for_equal_copies() -> None:
    logits = 5 * torch.randn(500, 2, 6, dtype=torch.float64)
    assert inconsistency(logits, 1.0, 0.0).min() > -1e-12
    assert inconsistency(logits, 1.0, 0.0).mean() > 0.1
    equal = logits[:, :1].expand(-1, 4, -1)
    assert inconsistency(equal, 1.0, 0.0).abs().max() < 1e-12
    torch.testing.assert_close(inconsistency(equal, 1.0, 0.5), 0.5 * Categorical(logits=logits[:, 0]).entropy())


def test_impossible_classes_give_finite_values_and_gradients() -> None:
    logits = torch.tensor([[[0.0, 300.0], [300.0, 0.0]], [[0.0, 300.0], [0.0, 300.0]]], requires_grad=True)
    penalty = inconsistency(logits, 1.0, 1.0)
    penalty.sum().backward()
    assert penalty.isfinite().all()
    assert logits.grad.isfinite().all()


def test_without_weights_it_is_gaussian_augmentation_and_with_them_it_adds_the_penalty(mlp, batch, progress) -> None:
    gaussian = Gaussian(0.5, 3)(mlp, batch, progress).per_example
    bare = Consistency(sigma=0.5, samples=3, lbd=0.0, eta=0.0)(mlp, batch, progress).per_example
    torch.testing.assert_close(bare, gaussian)
    objective = Consistency(sigma=0.5, samples=3, lbd=5.0, eta=0.5)
    views = objective.perturb(mlp, batch, progress)
    logits = torch.stack([mlp(views[:, v]) for v in range(3)], 1)
    torch.testing.assert_close(
        objective.losses(mlp, batch, views, progress).per_example, gaussian + inconsistency(logits, 5.0, 0.5)
    )


@pytest.mark.parametrize("wrong", [{"samples": 1}, {"lbd": -1.0}, {"eta": -0.1}])
def test_wrong_settings_are_refused(wrong) -> None:
    with pytest.raises(BadValue, match=f"{next(iter(wrong))}="):
        Consistency(sigma=0.5, **wrong)
