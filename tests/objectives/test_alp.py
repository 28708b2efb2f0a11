"""Adversarial logit pairing: its two terms, apart."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from trivet.objectives.alp import Alp
from trivet.objectives.plain import Plain
from trivet.threats.linf import Linf


def test_the_loss_is_half_of_each_cross_entropy_plus_the_mean_squared_gap_of_the_logits(mlp, batch, progress) -> None:
    objective = Alp(Linf(0.1), lam=0.7)
    x_adv = objective.perturb(mlp, batch, progress)
    found = objective.losses(mlp, batch, x_adv, progress).per_example.mean()
    z, z_adv = mlp(batch.inputs), mlp(x_adv)
    expected = (F.cross_entropy(z, batch.labels) + F.cross_entropy(z_adv, batch.labels)) / 2
    assert torch.allclose(found, expected + 0.7 * F.mse_loss(z_adv, z))


def test_without_pairing_it_is_the_mean_of_clean_and_adversarial_loss(mlp, batch, progress) -> None:
    objective = Alp(Linf(0.1), lam=0.0)
    x_adv = objective.perturb(mlp, batch, progress)
    plain = Plain()
    clean, adversarial = (plain.losses(mlp, batch, x, progress).per_example for x in (batch.inputs, x_adv))
    assert torch.equal(objective.losses(mlp, batch, x_adv, progress).per_example, 0.5 * (clean + adversarial))


def test_at_radius_zero_it_is_plain_training(mlp, batch, progress) -> None:
    found = Alp(Linf(0.0))(mlp, batch, progress)
    assert torch.equal(found.log["pairing"], torch.zeros(8))
    assert torch.equal(found.per_example, Plain()(mlp, batch, progress).per_example)
