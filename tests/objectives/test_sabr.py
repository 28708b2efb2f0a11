"""SABR: its two ends are IBP and PGD training, its box lies in the ball, and shrinking is what it says."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from interval_rules import ball, worst_loss
from torch import nn

from trivet.errors import BadValue
from trivet.objectives.certified import Step, network_of
from trivet.objectives.ibp import Ibp
from trivet.objectives.objective import Progress
from trivet.objectives.sabr import Sabr, small_box
from trivet.threats.linf import Linf

END = Progress(step=9, steps=10, epoch=9.0, seed=7)
EPS = 0.1


def test_a_box_of_the_whole_ball_is_ibp(rectified, exact_batch) -> None:
    found = Sabr(Linf(EPS), lam=1.0, steps=2)(rectified, exact_batch, END).per_example
    torch.testing.assert_close(found, Ibp(Linf(EPS), kappa_end=0.0)(rectified, exact_batch, END).per_example)


def test_a_box_of_one_point_is_pgd_training(rectified, exact_batch) -> None:
    objective = Sabr(Linf(EPS), lam=0.0, steps=2)
    x = objective.perturb(rectified, exact_batch, END)
    assert (x - exact_batch.inputs).abs().max() > 0.9 * EPS
    found = objective.losses(rectified, exact_batch, x, END).per_example
    torch.testing.assert_close(found, nn.functional.cross_entropy(rectified(x), exact_batch.labels, reduction="none"))


def test_the_small_box_is_the_written_one_lies_in_the_ball_and_holds_the_point_or_is_next_to_it(
    rectified, exact_batch
) -> None:
    objective = Sabr(Linf(EPS), lam=0.25)
    lower, upper = ball(exact_batch, EPS)
    x = lower + (upper - lower) * torch.rand_like(lower)
    x[0], x[1] = lower[0], upper[1]
    step = Step(rectified, network_of(rectified, (2, 4, 4)), exact_batch, x, EPS, 1.0, END)
    box = small_box(step, objective.lam)
    torch.testing.assert_close(box.upper - box.lower, 0.25 * (upper - lower))
    assert (box.lower >= lower - 1e-12).all()
    assert (box.upper <= upper + 1e-12).all()
    assert (x >= box.lower - 1e-12).all()
    assert (x <= box.upper + 1e-12).all()
    inside = (x - 0.125 * (upper - lower) > lower) & (x + 0.125 * (upper - lower) < upper)
    torch.testing.assert_close(((box.lower + box.upper) / 2)[inside], x[inside])


def test_a_larger_box_has_a_larger_loss(rectified, exact_batch) -> None:
    objectives = [Sabr(Linf(EPS), lam=lam) for lam in (0.0, 0.3, 0.7, 1.0)]
    x = objectives[0].perturb(rectified, exact_batch, END)
    losses = [each.losses(rectified, exact_batch, x, END).per_example for each in objectives]
    assert all((a < b).all() for a, b in itertools.pairwise(losses))


def test_shrinking_multiplies_the_upper_ends_of_unstable_units_before_each_relu(rectified, exact_batch) -> None:
    """By hand, layer by layer, with the margins of the last layer merged."""
    objective = Sabr(Linf(EPS), lam=0.5, shrink=0.8)
    x = objective.perturb(rectified, exact_batch, END)
    step = Step(rectified, network_of(rectified, (2, 4, 4)), exact_batch, x, EPS, 1.0, END)
    box, seen = small_box(step, objective.lam), 0
    lower, upper = box.lower, box.upper
    from interval_rules import by_hand, merged_margins

    for module in rectified[:-1]:
        if isinstance(module, nn.ReLU):
            unstable = (lower < 0) & (upper > 0)
            seen += int(unstable.sum())
            upper = torch.where(unstable, 0.8 * upper, upper)
        lower, upper = by_hand(nn.Sequential(module), lower, upper)[-1]
    assert seen > 10
    margins = merged_margins(nn.Sequential(nn.Identity(), rectified[-1]), lower, upper, exact_batch.labels)
    found = objective.losses(rectified, exact_batch, x, END).per_example
    torch.testing.assert_close(found, worst_loss(margins))
    unshrunk = replace(objective, shrink=1.0).losses(rectified, exact_batch, x, END).per_example
    assert (found < unshrunk).all()


def test_the_attack_keeps_to_the_ball_and_restarts_find_no_less(rectified, exact_batch) -> None:
    lower, upper = ball(exact_batch, EPS)
    losses = {}
    for restarts in (1, 5):
        x = Sabr(Linf(EPS), steps=1, restarts=restarts).perturb(rectified, exact_batch, END)
        assert (x >= lower).all()
        assert (x <= upper).all()
        losses[restarts] = nn.functional.cross_entropy(rectified(x), exact_batch.labels, reduction="none")
    assert (losses[5] >= losses[1] - 1e-12).all()
    assert (losses[5] > losses[1] + 1e-6).any()


def test_the_attack_steps_by_two_over_the_steps_of_the_half_width_but_at_least_a_quarter() -> None:
    """Of a linear model every step goes the same way: the reach tells the length."""
    from trivet.data.dataset import Batch

    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2)).double()
    net[1].weight.data = torch.tensor([[-5.0], [5.0]]).double()
    net[1].bias.data.zero_()
    batch = Batch(torch.full((64, 1, 1, 1), 0.5).double(), torch.zeros(64, dtype=torch.int64), torch.arange(64))
    for steps, length in ((1, 2.0), (4, 0.5), (20, 0.25)):
        objective = Sabr(Linf(EPS), steps=steps)
        x = objective.perturb(net, batch, END)
        draw = END.generator("start")
        start = 0.5 + EPS * torch.empty_like(batch.inputs).uniform_(-1, 1, generator=draw)
        torch.testing.assert_close(x, (start + steps * length * EPS).clamp(max=0.6))


@pytest.mark.parametrize("wrong", [{"lam": 1.5}, {"shrink": 0.0}, {"steps": 0}, {"restarts": 0}])
def test_wrong_settings_are_refused_by_name(wrong) -> None:
    with pytest.raises(BadValue, match=next(iter(wrong))):
        Sabr(Linf(0.1), **wrong)
