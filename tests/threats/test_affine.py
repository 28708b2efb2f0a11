"""Mixing types: nothing to gain from a linear model, a gain on a witness, and the single attack at the corners."""

from __future__ import annotations

import pytest
import torch
from closed_forms import Linear, Points
from torch import Tensor, nn

from trivet.errors import BadValue
from trivet.threats.affine import Affine
from trivet.threats.attack import Target
from trivet.threats.l1 import L1
from trivet.threats.l2 import L2
from trivet.threats.linf import Linf
from trivet.threats.losses import margin
from trivet.threats.pgd import PGD
from trivet.threats.rotation_translation import RotationTranslation
from trivet.threats.union import Union

PAIR = Union((Linf(0.1), L1(1.5)))
RT = RotationTranslation(shift=0.5, angle=10.0, shifts=3, angles=5)


def gauge(delta: Tensor, linf: float, l1: float) -> Tensor:
    """min over cuts t of t / linf + sum max(|d| - t, 0) / l1: at most 1 exactly in the mixtures of the two balls.

    A piecewise linear function, so it is least at one of its kinks, the entries of |d| and 0.
    """
    size = delta.double().flatten(1).abs()
    cuts = torch.cat((size.new_zeros(len(size), 1), size), 1)
    cost = cuts / linf + (size[:, None] - cuts[:, :, None]).clamp(min=0).sum(2) / l1
    return cost.amin(1)


def test_every_point_is_a_mixture_and_some_lie_in_no_member(robust_net: nn.Module, test_points: Points) -> None:
    x, y = test_points.x[:80], test_points.y[:80]
    found = Affine(PAIR, steps=10, restarts=3).search(Target(robust_net, robust_net), x, y)
    sizes = gauge(found - x, 0.1, 1.5)
    assert float(sizes.max()) <= 1 + 1e-6
    assert float(sizes.median()) > 0.8
    assert not bool(PAIR.contains(found, x).all())


@pytest.mark.parametrize("first", [Linf(0.1), L1(1.5), L2(0.5)])
def test_at_a_corner_it_is_the_attack_on_that_member(first, robust_net: nn.Module, test_points: Points) -> None:
    x, y, target = test_points.x[:40], test_points.y[:40], Target(robust_net, robust_net)
    others = tuple(each for each in (Linf(0.1), L1(1.5), L2(0.5)) if each != first)
    attack = Affine(Union((first, *others)), steps=6, restarts=1, weights=(1.0, 0.0, 0.0))
    mixed, alone = (
        each.search(target, x, y, torch.Generator().manual_seed(4)) for each in (attack, PGD(first, 6, loss="margin"))
    )
    torch.testing.assert_close(mixed, alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("weights", [(0.0, 1.0), (0.3, 0.7), (0.5, 0.5), (1.0, 0.0)])
def test_on_a_linear_margin_a_mixture_gains_the_mixture_of_the_gains(weights: tuple[float, float]) -> None:
    """max w.d = w_1 eps_1 ||w||_1 + w_2 eps_2 ||w||_2: linear in the weights, so no better than the better member."""
    model = Linear(2).double()
    x, y = torch.full((1, 1, 4, 4), 0.5, dtype=torch.float64), torch.zeros(1, dtype=torch.long)
    attack = Affine(Union((Linf(0.02), L2(0.1))), 20, restarts=1, weights=weights, random_start=False)
    found = attack.search(Target(model, model), x, y)
    slope = (model.weight[1] - model.weight[0]).detach()
    gains = 0.02 * slope.abs().sum(), 0.1 * slope.norm()
    gained = float((found - x).flatten() @ slope)
    assert gained == pytest.approx(float(weights[0] * gains[0] + weights[1] * gains[1]), abs=1e-6)
    assert gained <= float(max(gains)) + 1e-9


class Corner(nn.Module):
    """Class 1 exactly where both pixels rose far enough: d_1 >= 0.24 and d_2 >= 0.08."""

    def forward(self, x: Tensor) -> Tensor:
        rise = torch.minimum(x.flatten(1)[:, 0] - 0.24, x.flatten(1)[:, 1] - 0.08)
        return torch.stack((torch.zeros_like(rise), rise - 1e-6), 1)


def test_a_witness_falls_to_a_mixture_and_to_no_member() -> None:
    """l_inf 0.2 and l_1 0.3: 0.5 (0.3, 0) + 0.5 (0.2, 0.2) = (0.25, 0.1) breaks, no point of either ball does."""
    model, x, y = Corner(), torch.zeros(1, 1, 1, 2), torch.zeros(1, dtype=torch.long)
    union = Union((Linf(0.2), L1(0.3, quantile=1.0)))
    axis = torch.linspace(0, 0.3, 301, dtype=torch.float64)
    everything = torch.cartesian_prod(axis, axis).view(-1, 1, 1, 2)
    inside = union.contains(everything, torch.zeros_like(everything))
    broken = model(everything).argmax(1) == 1
    assert int(inside.sum()) > 40000
    assert int(broken.sum()) > 1000
    assert not bool((inside & broken).any())
    found = Affine(union, steps=40, restarts=1, weights=(0.5, 0.5), random_start=False).run(model, x, y)
    assert bool(found.broken.all())
    assert float(gauge(found.x_adv - x, 0.2, 0.3).max()) <= 1 + 1e-6


def test_rotations_come_first_and_the_norm_attack_moves_on_from_there(
    robust_net: nn.Module, test_points: Points
) -> None:
    x, y, target = test_points.x[:60], test_points.y[:60], Target(robust_net, robust_net)
    union = Union((RT, Linf(0.05)))
    half = Affine(union, steps=5, restarts=1, weights=(0.5, 0.5), draws=1)
    first, again = (half.search(target, x, y, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, again)
    moves = RT.scaled(0.5).random_moves(x, torch.Generator().manual_seed(1))
    centre = RT.scaled(0.5).moved(x, moves)
    assert bool(Linf(0.025).contains(first, centre).all())
    assert not torch.allclose(centre, x, atol=0.05)
    with torch.no_grad():
        rise = margin(robust_net(first), y) - margin(robust_net(centre), y)
    assert float((rise > 0).double().mean()) > 0.9


def test_more_restarts_never_break_less(robust_net: nn.Module, test_points: Points) -> None:
    x, y = test_points.x[:100], test_points.y[:100]
    one, many = (
        Affine(PAIR, steps=5, restarts=r).run(robust_net, x, y, generator=torch.Generator().manual_seed(0)).broken
        for r in (1, 4)
    )
    assert bool((many | ~one).all())


@pytest.mark.parametrize(
    ("threat", "settings", "message"),
    [
        (Linf(0.1), {}, "union of several"),
        (Union((RT, RT)), {}, "mixes one at most"),
        (PAIR, {"weights": (0.5, 0.6)}, "weights="),
        (PAIR, {"weights": (1.0,)}, "weights="),
        (PAIR, {"weights": (-1.0, 2.0)}, "weights="),
        (PAIR, {"steps": 0}, "steps="),
        (PAIR, {"restarts": 0}, "restarts="),
        (PAIR, {"draws": 0}, "draws="),
    ],
)
def test_wrong_settings_are_refused_by_name(threat, settings, message) -> None:
    with pytest.raises(BadValue, match=message):
        Affine(threat, **settings)
