"""The trade-off loss: its weights, and the two losses it lies between."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from trivet.objectives.pgd_at import PgdAt
from trivet.objectives.plain import Plain
from trivet.objectives.trade_off import TradeOff
from trivet.threats.linf import Linf


def test_it_is_the_weighted_mean_of_both_losses_and_undivided_on_request(mlp, batch, progress) -> None:
    objective = TradeOff(Linf(0.1), alpha=2.0, beta=3.0)
    adversarial = objective.perturb(mlp, batch, progress)
    clean, attacked = (F.cross_entropy(mlp(x), batch.labels, reduction="none") for x in (batch.inputs, adversarial))
    found = objective.losses(mlp, batch, adversarial, progress).per_example
    torch.testing.assert_close(found, (2 * clean + 3 * attacked) / 5)
    whole = TradeOff(Linf(0.1), alpha=2.0, beta=3.0, normalize=False)
    torch.testing.assert_close(whole.losses(mlp, batch, adversarial, progress).per_example, 2 * clean + 3 * attacked)


def test_without_the_clean_loss_it_is_pgd_training(mlp, batch, progress, gradients) -> None:
    ours, theirs = (
        gradients(mlp, each(mlp, batch, progress).per_example)
        for each in (TradeOff(Linf(0.1), 7, alpha=0.0), PgdAt(Linf(0.1), 7))
    )
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_at_radius_zero_it_is_plain_training(mlp, batch, progress) -> None:
    ours = TradeOff(Linf(0.0))(mlp, batch, progress).per_example
    torch.testing.assert_close(ours, Plain()(mlp, batch, progress).per_example)
