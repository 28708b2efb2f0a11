"""MTL-IBP, CC-IBP and Exp-IBP: between IBP and PGD training, by the written formulas."""

from __future__ import annotations

import pytest
import torch
from interval_rules import ball, merged_margins, worst_loss
from torch import nn

from trivet.errors import BadValue
from trivet.objectives.ibp import Ibp
from trivet.objectives.mtl_ibp import MtlIbp
from trivet.objectives.objective import Progress
from trivet.threats.linf import Linf

END = Progress(step=9, steps=10, epoch=9.0, seed=7)
EPS, FORMS = 0.05, ["mtl", "cc", "exp"]


def attacked(net: nn.Module, batch, objective: MtlIbp) -> torch.Tensor:
    x = objective.perturb(net, batch, END)
    return nn.functional.cross_entropy(net(x), batch.labels, reduction="none")


@pytest.mark.parametrize("form", FORMS)
def test_its_ends_are_ibp_and_pgd_training(form, rectified, exact_batch) -> None:
    at_one = MtlIbp(Linf(EPS), form=form, alpha=1.0)(rectified, exact_batch, END).per_example
    torch.testing.assert_close(at_one, Ibp(Linf(EPS), kappa_end=0.0)(rectified, exact_batch, END).per_example)
    objective = MtlIbp(Linf(EPS), form=form, alpha=0.0)
    torch.testing.assert_close(
        objective(rectified, exact_batch, END).per_example, attacked(rectified, exact_batch, objective)
    )


@pytest.mark.parametrize("form", FORMS)
def test_between_them_it_is_the_written_mixture(form, rectified, exact_batch) -> None:
    objective = MtlIbp(Linf(EPS), form=form, alpha=0.3)
    margins = merged_margins(rectified, *ball(exact_batch, EPS), exact_batch.labels)
    bound, attack = worst_loss(margins), attacked(rectified, exact_batch, objective)
    if form == "cc":
        logits = rectified(objective.perturb(rectified, exact_batch, END))
        own = logits.gather(1, exact_batch.labels[:, None]) - logits
        others = own[~nn.functional.one_hot(exact_batch.labels, 4).bool()].view(8, 3)
        expected = worst_loss(0.3 * margins + 0.7 * others)
    else:
        expected = 0.3 * bound + 0.7 * attack if form == "mtl" else bound**0.3 * attack**0.7
    found = objective(rectified, exact_batch, END).per_example
    torch.testing.assert_close(found, expected)
    assert (attack < found).all()
    assert (found < bound).all()


def test_the_dials_differ_in_order_power_below_mean_and_mixed_margins_below_it(rectified, exact_batch) -> None:
    """Weighted means of the losses: geometric below arithmetic; log-sum-exp is convex, so CC-IBP lies below MTL-IBP."""
    mtl, cc, power = (MtlIbp(Linf(EPS), form=form)(rectified, exact_batch, END).per_example for form in FORMS)
    assert (power < mtl).all()
    assert (cc < mtl).all()


def test_a_scaled_attack_goes_further_than_the_bounds(rectified, exact_batch) -> None:
    reach = [
        float(
            (MtlIbp(Linf(EPS), attack_scale=scale).perturb(rectified, exact_batch, END) - exact_batch.inputs)
            .abs()
            .max()
        )
        for scale in (1.0, 2.0)
    ]
    assert reach == pytest.approx([EPS, 2 * EPS])
    one, two = (MtlIbp(Linf(EPS), attack_scale=scale, alpha=1.0) for scale in (1.0, 2.0))
    torch.testing.assert_close(
        one(rectified, exact_batch, END).per_example, two(rectified, exact_batch, END).per_example
    )


@pytest.mark.parametrize("form", FORMS)
def test_gradients_stay_finite_where_losses_underflow(form, gradients) -> None:
    from trivet.data.dataset import Batch

    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    net[1].weight.data.zero_()
    net[1].bias.data = torch.tensor([200.0, 0.0])
    batch = Batch(torch.rand(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64), torch.arange(3))
    found = MtlIbp(Linf(EPS), form=form, alpha=0.02)(net, batch, END).per_example
    assert found.isfinite().all()
    assert all(each.isfinite().all() for each in gradients(net, found))


@pytest.mark.parametrize("wrong", [{"alpha": 1.5}, {"form": "mean"}, {"attack_scale": -1.0}])
def test_wrong_settings_are_refused_by_name(wrong) -> None:
    with pytest.raises(BadValue, match=next(iter(wrong))):
        MtlIbp(Linf(0.1), **wrong)
