"""AutoAttack: its contents, its account of what broke what, and the authors' own."""

from __future__ import annotations

import pytest
import torch
from closed_forms import Points
from quick import QuickAutoAttack
from torch import Tensor, nn

from trivet.methods import build, spec_of
from trivet.threats.apgd import APGD, APGDT
from trivet.threats.autoattack import AutoAttack
from trivet.threats.fab import FAB, FABT
from trivet.threats.l1 import L1
from trivet.threats.l2 import L2
from trivet.threats.linf import Linf
from trivet.threats.square import Square
from trivet.threats.threat import ThreatModel


def test_the_versions_hold_what_the_authors_put_in_them() -> None:
    ball, sparse = Linf(0.1), L1(2.0)
    standard = AutoAttack(ball).components()
    assert list(standard.values()) == [APGD(ball), APGDT(ball), FABT(ball), Square(ball)]
    assert standard["apgd_ce"].steps == standard["apgd_t"].steps == standard["fab_t"].steps == 100  # type: ignore[attr-defined]
    assert standard["square"].queries == 5000  # type: ignore[attr-defined]
    assert list(AutoAttack(sparse).components().values()) == [
        APGD(sparse, restarts=5),
        APGDT(sparse, targets=5),
        FABT(sparse),
        Square(sparse),
    ]
    assert list(AutoAttack(ball, version="plus").components().values()) == [
        APGD(ball, restarts=5),
        APGD(ball, loss="dlr", restarts=5),
        FAB(ball, restarts=5),
        Square(ball),
        APGDT(ball),
        FABT(ball),
    ]
    assert list(AutoAttack(ball, version="rand").components().values()) == [
        APGD(ball, samples=20),
        APGD(ball, loss="dlr", samples=20),
    ]


def test_a_recipe_can_name_it() -> None:
    attack = build("threats", {"name": "autoattack", "version": "plus"}, threat=Linf(0.1))
    assert attack == AutoAttack(Linf(0.1), version="plus")
    assert build("threats", spec_of(attack)) == attack


def test_the_account_adds_up_and_equals_the_plain_run(plain_net: nn.Module, test_points: Points) -> None:
    x, y = test_points.x[:40], test_points.y[:40].clone()
    y[:3] = (y[:3] + 1) % 10
    attack = QuickAutoAttack(Linf(0.12))
    detail = attack.run_detailed(plain_net, x, y, generator=torch.Generator().manual_seed(0))
    run = attack.run(plain_net, x, y, generator=torch.Generator().manual_seed(0))
    assert torch.equal(run.broken, detail.broken)
    assert torch.equal(run.x_adv, detail.x_adv)
    assert torch.equal(detail.by >= 0, detail.broken)
    assert torch.equal(detail.by == 0, plain_net(x).argmax(1) != y)
    assert torch.equal(plain_net(detail.x_adv).argmax(1) != y, detail.broken)
    assert bool(attack.threat.contains(detail.x_adv, x).all())
    assert detail.components == ("apgd_ce", "apgd_t", "fab_t", "square")
    counts = list(detail.standing.values())
    assert list(detail.standing) == ["clean", *detail.components]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == int((detail.by != 0).sum())
    assert counts[-1] == int((~detail.broken).sum())
    assert counts[1] < counts[0]
    assert detail.square_gain <= 0.05


class Rounded(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x * 16).round() / 16)


def test_hidden_gradients_show_in_what_square_gains(plain_net: nn.Module, test_points: Points) -> None:
    detail = QuickAutoAttack(Linf(0.1)).run_detailed(Rounded(plain_net), test_points.x[:30], test_points.y[:30])
    assert detail.square_gain > 0.1
    without = QuickAutoAttack(Linf(0.1), version="rand", eot=2)
    assert without.run_detailed(plain_net, test_points.x[:5], test_points.y[:5]).square_gain == 0


def test_it_is_no_weaker_than_any_of_its_parts(robust_net: nn.Module, test_points: Points) -> None:
    x, y = test_points.x[:60], test_points.y[:60]
    attack = QuickAutoAttack(L2(0.4))
    left = int((~attack.run_detailed(robust_net, x, y).broken).sum())
    for component in list(attack.components().values())[:3]:
        assert left <= int((~component.run(robust_net, x, y).broken).sum())


@pytest.mark.slow
@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.5), L1(2.0)], ids=lambda t: t.norm)
def test_the_authors_code_leaves_the_same_accuracy_within_half_a_point(
    threat: ThreatModel, robust_net: nn.Module, test_points: Points
) -> None:
    from autoattack import AutoAttack as Reference

    x, y = test_points.x[:200], test_points.y[:200]
    theirs = Reference(robust_net, norm=threat.norm, eps=threat.eps, seed=0, verbose=False, device="cpu")
    expected = (robust_net(theirs.run_standard_evaluation(x, y, bs=200)).argmax(1) == y).float().mean().item()
    left = (~AutoAttack(threat).run_detailed(robust_net, x, y).broken).float().mean().item()
    assert left == pytest.approx(expected, abs=0.0051)
