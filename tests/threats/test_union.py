"""Unions: the nearest member, any member, and accuracies that are the intersection of the members'."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from closed_forms import Points
from torch import nn

from trivet.errors import BadValue
from trivet.methods import build, spec_of
from trivet.threats.l1 import L1
from trivet.threats.l2 import L2
from trivet.threats.linf import Linf
from trivet.threats.pgd import PGD, fgsm
from trivet.threats.rotation_translation import RotationTranslation, RotationTranslationSearch
from trivet.threats.threat import ThreatModel
from trivet.threats.union import Union, WorstOf, over_members

RT = RotationTranslation(shift=0.5, angle=10.0, shifts=3, angles=5)
THREE = Union((Linf(0.1), L1(2.0), RT))


def test_a_point_is_in_the_union_if_and_only_if_it_is_in_a_member() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(40, 1, 8, 8, generator=draw)
    for member in THREE.members:
        assert bool(THREE.contains(member.random_start(x, draw), x).all())
    far = x + 0.2 * torch.rand(x.shape, generator=draw)
    in_any = torch.stack([member.contains(far, x) for member in THREE.members]).any(0)
    assert torch.equal(THREE.contains(far, x), in_any)
    assert not bool(in_any.any())


def test_the_projection_is_the_nearest_of_the_members_projections() -> None:
    draw = torch.Generator().manual_seed(1)
    x = torch.rand(30, 1, 4, 4, generator=draw, dtype=torch.float64)
    anything = (
        x + torch.randn(x.shape, generator=draw, dtype=torch.float64) * torch.logspace(-3, 0, 30)[:, None, None, None]
    )
    union = Union((Linf(0.1), L1(0.8)))
    point = union.project(anything, x)
    apart = torch.stack([(m.project(anything, x) - anything).flatten(1).norm(dim=1) for m in union.members])
    torch.testing.assert_close((point - anything).flatten(1).norm(dim=1), apart.amin(0))
    assert bool(union.contains(point, x).all())
    assert set(apart.argmin(0).tolist()) == {0, 1}
    assert torch.equal(union.project(point, x), point)


def test_random_starts_come_from_every_member() -> None:
    x = torch.full((60, 1, 8, 8), 0.5)
    x[:, :, :4] = 0.2
    start = THREE.random_start(x, torch.Generator().manual_seed(2))
    counts = [int(member.contains(start, x).sum()) for member in THREE.members]
    assert bool(THREE.contains(start, x).all())
    assert all(count >= 5 for count in counts)


def test_members_are_scaled_together_and_nested_unions_are_taken_apart() -> None:
    nested = Union((Union((Linf(0.1), L2(0.5)), eps=0.5), L1(2.0)))
    assert nested.members == (Linf(0.05), L2(0.25), L1(2.0))
    assert nested.scaled(2.0).members == (Linf(0.1), L2(0.5), L1(4.0))
    assert Linf(0.1).members == (Linf(0.1),)


def test_a_recipe_can_name_it_and_its_spec_builds_an_equal_one() -> None:
    spec = {"name": "union", "threats": [{"name": "linf", "eps": 0.1}, {"name": "l1", "eps": 2}]}
    made = build("threats", spec, expects=ThreatModel)
    assert made == Union((Linf(0.1), L1(2.0)))
    assert build("threats", spec_of(THREE), expects=ThreatModel) == THREE


def test_what_stands_against_the_union_stands_against_every_member(plain_net: nn.Module, test_points: Points) -> None:
    """On the same points, attack by attack with the same draws, hence never above the least of the members."""
    x, y = test_points.x[:100], test_points.y[:100]
    threat = Union((Linf(0.03), L1(0.7), RT))
    members = (
        PGD(Linf(0.03), 10, random_start=False),
        PGD(L1(0.7), 10, random_start=False),
        RotationTranslationSearch(RT),
    )
    broken = torch.stack([attack.run(plain_net, x, y).broken for attack in members])
    found = WorstOf(threat, members).run(plain_net, x, y)
    assert torch.equal(found.broken, broken.any(0))
    assert bool(threat.contains(found.x_adv, x).all())
    union, each = 1 - float(broken.any(0).float().mean()), 1 - broken.float().mean(1)
    assert 0 < union < float(each.min())


def test_attacks_are_spread_over_members_and_rotations_are_tried() -> None:
    made = over_members(THREE, partial(PGD, steps=7), draws=3)
    assert made == WorstOf(THREE, (PGD(Linf(0.1), 7), PGD(L1(2.0), 7), RotationTranslationSearch(RT, 3)))
    assert over_members(Linf(0.1), fgsm) == fgsm(Linf(0.1))


def test_attacks_on_the_union_as_a_whole_are_refused_with_the_mend(plain_net: nn.Module, test_points: Points) -> None:
    with pytest.raises(BadValue, match="attack its members one by one"):
        PGD(THREE).run(plain_net, test_points.x[:2], test_points.y[:2])
    with pytest.raises(BadValue, match="threats="):
        Union(())
    with pytest.raises(BadValue, match="eps=-1"):
        Union((Linf(0.1),), eps=-1)
