"""SLIDE: never outside the ball, exact where the steepest step is, and stronger than PGD that moves one pixel."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from closed_forms import Linear, Points
from scipy.optimize import linprog
from torch import nn

from trivet.errors import BadValue
from trivet.methods import build
from trivet.threats.attack import Target
from trivet.threats.l1 import L1
from trivet.threats.linf import Linf
from trivet.threats.losses import margin
from trivet.threats.slide import Slide, laplace_start


def test_every_point_it_returns_lies_in_the_ball_even_those_that_break_nothing(
    robust_net: nn.Module, test_points: Points
) -> None:
    x, y = test_points.x[:60], test_points.y[:60]
    for eps in (0.3, 2.0, 10.0):
        found = Slide(L1(eps), steps=7, restarts=2).search(Target(robust_net, robust_net), x, y)
        assert bool(L1(eps).contains(found, x).all())
        assert float((found - x).abs().flatten(1).sum(1).min()) > 0.5 * eps


@pytest.mark.parametrize("eps", [0.4, 1.5])
def test_one_pixel_at_a_time_reaches_the_optimum_of_a_linear_program(eps: float) -> None:
    """max w.d over ||d||_1 <= eps in the box, solved by splitting d into its rise and its fall."""
    model = Linear(2).double()
    x = torch.rand(6, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    y = torch.zeros(6, dtype=torch.long)
    attack = Slide(L1(eps), steps=200, gamma=eps / 50, quantiles=(1.0, 1.0), random_start=False)
    found = attack.search(Target(model, model), x, y)
    slope = (model.weight[1] - model.weight[0]).detach()
    gained = ((found - x).flatten(1) @ slope).tolist()
    for image, gain in zip(x.flatten(1), gained, strict=True):
        both = torch.cat((slope, -slope)).numpy()
        room = torch.cat((1 - image, image)).numpy()
        best = linprog(-both, A_ub=[[1.0] * 32], b_ub=[eps], bounds=[(0, each) for each in room])
        assert gain <= -best.fun + 1e-9
        assert gain == pytest.approx(-best.fun, rel=0.02)


def test_with_a_quantile_below_one_it_moves_the_largest_entries_equally() -> None:
    model = Linear(2).double()
    x, y = torch.full((1, 1, 4, 4), 0.5, dtype=torch.float64), torch.zeros(1, dtype=torch.long)
    found = Slide(L1(0.4), steps=1, gamma=0.4, quantiles=(0.75, 0.75), random_start=False).search(
        Target(model, model), x, y
    )
    slope = (model.weight[1] - model.weight[0]).detach()
    top = slope.abs().topk(4).indices
    expected = torch.zeros(16, dtype=torch.float64)
    expected[top] = 0.1 * slope[top].sign()
    torch.testing.assert_close((found - x).flatten(), expected)


def test_spreading_a_step_over_several_pixels_breaks_more_than_moving_one(
    robust_net: nn.Module, test_points: Points
) -> None:
    x, y = test_points.x[:300], test_points.y[:300]
    sparse = Slide(L1(2.5), steps=10)
    spread, single = (
        int(each.run(robust_net, x, y).broken.sum()) for each in (sparse, replace(sparse, quantiles=(1.0, 1.0)))
    )
    assert spread > single


def test_the_start_is_laplace_noise_on_the_sphere_where_the_box_is_far() -> None:
    x = torch.full((200, 1, 5, 5), 0.5, dtype=torch.float64)
    start = laplace_start(L1(0.6), x, torch.Generator().manual_seed(0)) - x
    torch.testing.assert_close(start.abs().flatten(1).sum(1), torch.full((200,), 0.6, dtype=torch.float64))
    shares = (start.abs() / 0.6).flatten()  # |Laplace| / sum is Beta(1, 24): P(share > t) = (1 - t)^24
    for t in (0.02, 0.05, 0.1):
        # 5000 shares; six standard errors of a share of independent ones, which these negatively dependent ones beat.
        assert float((shares > t).double().mean()) == pytest.approx((1 - t) ** 24, abs=6 * 0.5 / 5000**0.5)
    assert float((start > 0).double().mean()) == pytest.approx(0.5, abs=6 * 0.5 / 5000**0.5)


def test_a_restart_can_only_break_more(robust_net: nn.Module, test_points: Points) -> None:
    x, y = test_points.x[:150], test_points.y[:150]
    once = Slide(L1(1.5), steps=5)
    draws = [torch.Generator().manual_seed(5) for _ in range(2)]
    first = once.run(robust_net, x, y, generator=draws[0]).broken
    more = replace(once, restarts=3).run(robust_net, x, y, generator=draws[1]).broken
    assert bool((more | ~first).all())


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"restarts": 0}, {"gamma": -1.0}, {"quantiles": (0.9, 0.8)}, {"quantiles": (0.5, 1.1)}]
)
def test_wrong_settings_are_refused_by_name(wrong: dict[str, object]) -> None:
    with pytest.raises(BadValue, match=next(iter(wrong))):
        Slide(L1(1.0), **wrong)


def test_it_knows_one_geometry() -> None:
    with pytest.raises(BadValue, match="give it l1"):
        Slide(Linf(0.1))
    assert build("threats", {"name": "slide", "quantiles": [0.99, 0.99]}, threat=L1(2.0)) == Slide(
        L1(2.0), quantiles=(0.99, 0.99)
    )


def test_the_margin_is_what_it_raises(robust_net: nn.Module, test_points: Points) -> None:
    x, y = test_points.x[:100], test_points.y[:100]
    found = Slide(L1(1.0), steps=10).search(Target(robust_net, robust_net), x, y)
    with torch.no_grad():
        assert bool((margin(robust_net(found), y) > margin(robust_net(x), y)).float().mean() > 0.95)
