"""Pointwise: what it gives back, what it cannot, and models whose gradients say nothing."""

from __future__ import annotations

import pytest
import torch
from closed_forms import Points
from torch import Tensor, nn

from trivet.errors import BadValue
from trivet.threats.attack import Target
from trivet.threats.l1 import L1
from trivet.threats.pgd import PGD
from trivet.threats.pointwise import Pointwise, given_back, salted


class Alarm(nn.Module):
    """Class 1 as soon as pixel 3 is above 0.6; no other pixel matters, and the gradient is zero everywhere."""

    def forward(self, x: Tensor) -> Tensor:
        high = (x.flatten(1)[:, 3] > 0.6).to(x.dtype)
        return torch.stack((1 - high, high), 1) + 0 * x.flatten(1).sum(1, keepdim=True)


def test_it_finds_the_one_pixel_that_matters_and_the_least_change_to_a_half_power() -> None:
    model, x, y = Alarm(), torch.full((5, 1, 4, 4), 0.2), torch.zeros(5, dtype=torch.long)
    found = Pointwise(L1(0.45), restarts=30).run(model, x, y)  # half of all draws blacken the pixel instead
    assert bool(found.broken.all())
    change = (found.x_adv - x).flatten(1)
    assert bool((change[:, torch.arange(16) != 3] == 0).all())
    # From 1.0 towards 0.2 in halves: 0.2 + 0.8 (k / 32), the first above 0.6 is k = 17.
    torch.testing.assert_close(change[:, 3], torch.full((5,), 0.8 * 17 / 32))
    assert not bool(PGD(L1(0.45), 10).run(model, x, y).broken.any())
    assert not bool(Pointwise(L1(0.42), restarts=30).run(model, x, y).broken.any())


def test_no_changed_pixel_could_still_be_put_back(plain_net: nn.Module, test_points: Points) -> None:
    x, y, target = test_points.x[:12], test_points.y[:12], Target(plain_net, plain_net)
    draw = torch.Generator().manual_seed(0)
    start = salted(target, x, y, draw)
    fell = target.misclassifies(start, y)
    assert int(fell.sum()) >= 10
    start, x, y = start[fell], x[fell], y[fell]
    point = given_back(target, start, x, y, draw)
    assert bool(target.misclassifies(point, y).all())
    size, before = ((each - x).abs().flatten(1).sum(1) for each in (point, start))
    assert bool((size <= before).all())
    assert float(size.sum()) < 0.5 * float(before.sum())
    changed = point.flatten(1) != x.flatten(1)
    assert bool((changed.sum(1) < (start != x).flatten(1).sum(1)).any())
    assert bool((((start - x) * (point - x)).flatten(1) >= 0).all()), "a change only shrinks, it never turns"


def test_more_salt_comes_only_where_less_did_not_do(plain_net: nn.Module, test_points: Points) -> None:
    x, y, target = test_points.x[:30], test_points.y[:30].clone(), Target(plain_net, plain_net)
    y[:3] = (plain_net(x[:3]).argmax(1) + 1) % 10  # wrong without any
    point = salted(target, x, y, torch.Generator().manual_seed(0))
    assert torch.equal(point[:3], x[:3])
    wrong = target.misclassifies(point, y)
    assert torch.equal(point[~wrong], x[~wrong])
    assert bool(((point == x) | (point == 0) | (point == 1)).all())


def test_at_least_one_search_is_asked_for() -> None:
    with pytest.raises(BadValue, match="restarts=0"):
        Pointwise(L1(1.0), restarts=0)
