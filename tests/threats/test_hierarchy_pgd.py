"""Forced mistakes against exhaustive search on linear models, where the best corner for each target is known."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from trivet.data.hierarchy import Hierarchy
from trivet.errors import BadValue
from trivet.threats.attack import Attack
from trivet.threats.hierarchy_pgd import HierarchyPGD
from trivet.threats.linf import Linf
from trivet.threats.pgd import PGD

TREE = Hierarchy(tuple("abcdef"), [[["a", "b"], "c"], ["d", "e"], "f"])
EPS, POINTS, PIXELS = 0.1, 60, 8
THREAT = Linf(EPS)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    """All classes are as likely in the middle of the inputs."""
    made = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 6)).double().eval().requires_grad_(False)
    made[1].weight.normal_(generator=torch.Generator().manual_seed(0))
    made[1].bias.copy_(-0.5 * made[1].weight.sum(1))
    return made


@pytest.fixture(scope="module")
def records(net: nn.Module) -> tuple[Tensor, Tensor]:
    """Points well inside [0, 1], labelled as the model labels them."""
    x = 0.3 + 0.4 * torch.rand(POINTS, 1, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x, net(x).argmax(1)


def reachable(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """[N, K] bool: the classes that the model gives to some corner of the ball, by trying all 256 of them.

    Between corners there may be more; what is found at one is reachable for certain.
    """
    corners = EPS * torch.tensor(list(product((-1.0, 1.0), repeat=PIXELS)), dtype=torch.float64)
    said = net((x.flatten(1)[:, None] + corners).flatten(0, 1)).argmax(1).view(len(x), -1)
    there = torch.zeros(len(x), 6, dtype=torch.bool)
    return there.scatter(1, said, torch.ones_like(said, dtype=torch.bool)) & (torch.arange(6) != y[:, None])


def forced(attack: Attack, net: nn.Module, records: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Who was broken, and D of the class each was driven to."""
    x, y = records
    found = attack.run(net, x, y)
    assert bool(THREAT.contains(found.x_adv, x).all())
    apart = TREE.distances[y, net(found.x_adv).argmax(1)]
    assert torch.equal(apart > 0, found.broken)
    return found.broken, apart


def test_the_mistakes_are_as_severe_and_as_mild_as_those_of_exhaustive_search(net, records) -> None:
    can, apart = reachable(net, *records), TREE.distances[records[1]]
    most = apart.where(can, 0).amax(1)
    least = apart.where(can, 99).amin(1)
    broken, severe = forced(HierarchyPGD(THREAT, hierarchy=TREE), net, records)
    also, mild = forced(HierarchyPGD(THREAT, hierarchy=TREE, towards="similar"), net, records)
    some = can.any(1)
    assert int(some.sum()) > 10
    assert len(set(most[some].tolist())) > 1
    assert bool(broken[some].all())
    assert bool(also[some].all())
    # Corners are the best points for margins between two classes, not for being the first of six: either may find more.
    assert float((severe[some] == most[some]).double().mean()) > 0.9
    assert float((mild[some] == least[some]).double().mean()) > 0.9
    assert bool((severe >= mild).all())
    assert float(severe[some].double().mean()) > float(mild[some].double().mean())


def test_it_breaks_what_untargeted_descent_breaks_and_its_mistakes_are_more_severe(net, records) -> None:
    broken, apart = forced(PGD(THREAT, 20), net, records)
    ours, severe = forced(HierarchyPGD(THREAT, hierarchy=TREE), net, records)
    assert bool(ours[broken].all())
    assert bool((severe >= apart).all())
    assert bool((severe > apart).any())


def test_more_targets_break_more_points(net, records) -> None:
    few, _ = forced(HierarchyPGD(THREAT, hierarchy=TREE, targets=1), net, records)
    every, _ = forced(HierarchyPGD(THREAT, hierarchy=TREE), net, records)
    assert bool((few <= every).all())
    assert int(few.sum()) < int(every.sum())


def test_small_batches_of_tries_find_as_much(net, records) -> None:
    x, y = records
    whole, pieces = (HierarchyPGD(THREAT, hierarchy=TREE).run(net, x, y, batch_size=size).broken for size in (512, 7))
    assert torch.equal(whole, pieces)


def test_without_a_radius_nothing_is_forced(net, records) -> None:
    assert not HierarchyPGD(Linf(0.0), hierarchy=TREE).run(net, *records).broken.any()


def test_wrong_settings_are_refused(net, records) -> None:
    attack = HierarchyPGD(THREAT, hierarchy=TREE)
    for name in ("steps", "targets", "samples"):
        with pytest.raises(BadValue, match=f"{name}=0 must be at least 1"):
            replace(attack, **{name: 0})
    with pytest.raises(BadValue, match="towards='any' must be one of"):
        replace(attack, towards="any")
    with pytest.raises(BadValue, match="step_size=-1 must not be negative"):
        replace(attack, step_size=-1)
    with pytest.raises(BadValue, match="model's 6 classes, not of 2"):
        replace(attack, hierarchy=Hierarchy(("a", "b"), ["a", "b"])).run(net, *records)
