"""FAB against closed-form distances, against its targets taken one by one, and the authors' code."""

from __future__ import annotations

import pytest
import torch
from closed_forms import Linear, Points
from torch import nn

from trivet.errors import BadValue
from trivet.threats.attack import Target
from trivet.threats.fab import FAB, FABT
from trivet.threats.l1 import L1
from trivet.threats.l2 import L2
from trivet.threats.linf import Linf
from trivet.threats.threat import ThreatModel

P = {"Linf": torch.inf, "L2": 2.0, "L1": 1.0}
threats = pytest.mark.parametrize("threat", [Linf(0.1), L2(0.5), L1(1.0)], ids=lambda t: t.norm)


@threats
@pytest.mark.parametrize("kind", [FAB, FABT])
@pytest.mark.parametrize("classes", [2, 5])
def test_the_distance_of_a_linear_boundary_is_the_margin_over_the_dual_norm(
    kind: type[FAB] | type[FABT], classes: int, threat: ThreatModel
) -> None:
    model = Linear(classes)
    model.bias.data = -0.7 * model.weight.data.sum(1) / 2  # boundaries near the centre, where the box is far
    x = 0.45 + 0.1 * torch.rand(60, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(1)
    exact = model.distances(x, y, threat.norm).amin(1)
    inside = exact < 0.3
    point, distance = kind(threat, steps=40).nearest(Target(model, model), x, y)
    assert int(inside.sum()) >= 5
    assert bool((distance >= exact * (1 - 1e-5)).all())
    torch.testing.assert_close(distance[inside], exact[inside], rtol=0.02, atol=1e-5)
    assert bool((model(point).argmax(1) != y)[inside].all())


@threats
def test_points_come_to_lie_in_the_set_when_they_are_near_enough(threat: ThreatModel) -> None:
    model = Linear(3)
    x = 0.3 + 0.4 * torch.rand(60, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(1)
    exact = model.distances(x, y, threat.norm).amin(1)
    _, broken = FABT(threat).run(model, x, y)
    assert bool(broken[exact < 0.95 * threat.eps].all())
    assert not bool(broken[exact > threat.eps].any())


def test_fused_targets_find_what_targets_one_by_one_find(robust_net: nn.Module, test_points: Points) -> None:
    x = test_points.x[:25]
    y = robust_net(x).argmax(1)
    target = Target(robust_net, robust_net)
    _, fused = FABT(Linf(0.1), steps=20).nearest(target, x, y)
    ranked = robust_net(x).argsort(1, descending=True)
    assert torch.equal(ranked[:, 0], y)

    def swapped(aim: int) -> torch.Tensor:
        """The distance with class `aim` of each point's ranking as the only target."""
        attack = FABT(Linf(0.1), steps=20)
        from trivet.threats import fab

        row = torch.arange(len(x))
        tries = attack._approach(target, fab._aimed_boundary, 0.0, fab._here, x, y, ranked[:, aim], row)
        return -tries.score

    alone = torch.stack([swapped(aim) for aim in range(1, 10)]).amin(0)
    torch.testing.assert_close(fused, alone, rtol=1e-4, atol=1e-5)


def test_restarts_start_elsewhere_and_never_do_worse(plain_net: nn.Module, test_points: Points) -> None:
    x = test_points.x[:20]
    y = plain_net(x).argmax(1)
    target = Target(plain_net, plain_net)
    once, thrice = (FAB(L2(0.5), steps=8, restarts=n).nearest(target, x, y)[1] for n in (1, 3))
    assert bool((thrice <= once + 1e-6).all())
    assert bool((thrice < once - 1e-4).any())


def test_a_model_that_cannot_be_moved_is_reported_as_infinitely_far() -> None:
    model = Linear(2)
    model.weight.data.zero_()
    model.bias.data = torch.tensor([1.0, 0.0])
    x = torch.rand(3, 1, 4, 4)
    for attack in (FAB(Linf(0.1), steps=3), FABT(L2(0.1), steps=3)):
        point, distance = attack.nearest(Target(model, model), x, torch.zeros(3, dtype=torch.long))
        assert distance.tolist() == [torch.inf] * 3
        assert torch.equal(point, x)


def test_other_geometries_are_refused() -> None:
    class Spiral(Linf):
        norm = "spiral"

    with pytest.raises(BadValue, match="not spiral"):
        FABT(Spiral(0.1))


@pytest.mark.slow
@pytest.mark.usefixtures("reference")
@threats
def test_the_authors_code_finds_as_many(threat: ThreatModel, robust_net: nn.Module, test_points: Points) -> None:
    from autoattack.fab_pt import FABAttack_PT

    x, y = test_points.x[:120], test_points.y[:120]
    theirs = FABAttack_PT(robust_net, norm=threat.norm, eps=threat.eps, targeted=True).perturb(x, y)
    inside = torch.linalg.vector_norm((theirs - x).flatten(1), ord=P[threat.norm], dim=1) <= threat.eps
    expected = int(((robust_net(theirs).argmax(1) != y) & inside).sum())
    assert abs(int(FABT(threat).run(robust_net, x, y).broken.sum()) - expected) <= 1
