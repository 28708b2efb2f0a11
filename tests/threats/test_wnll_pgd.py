"""Attacks on a WNLL head: what each of them follows, and that no way of looking at such a network leaves one out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trivet.audit import masking
from trivet.audit.audit import Audit
from trivet.audit.findings import Findings
from trivet.data.dataset import Dataset
from trivet.errors import BadValue
from trivet.models.wnll import THROUGH, WnllHead
from trivet.randomness import generator
from trivet.threats.attack import Attack, misclassified
from trivet.threats.l2 import L2
from trivet.threats.linf import Linf
from trivet.threats.pgd import PGD
from trivet.threats.rotation_translation import RotationTranslation
from trivet.threats.union import Union
from trivet.threats.wnll_pgd import WnllPGD, WnllTransfer, wnll_battery

THREAT = Linf(0.2)


def records(count: int, seed: int) -> Dataset:
    """Two classes of four pixels, four deviations apart in their mean."""
    labels = torch.arange(count) % 2
    noise = torch.randint(0, 60, (count, 1, 2, 2), generator=torch.Generator().manual_seed(seed))
    return Dataset((60 + 70 * labels.view(-1, 1, 1, 1) + noise).to(torch.uint8), labels, ("a", "b"), "pixels")


@pytest.fixture(scope="module")
def net() -> nn.Module:
    """Pixels are the features; the linear layer splits them by their mean."""
    linear = nn.Linear(4, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[-1.0] * 4, [1.0] * 4]))
        linear.bias.copy_(torch.tensor([1.0, -1.0]) * 4 * 124.5 / 255)
    model = nn.Sequential(nn.Flatten(), WnllHead(linear, 60)).eval()
    chosen = records(60, 0).batch(torch.arange(60))
    model[1].fill(chosen.inputs.flatten(1), chosen.labels)  # type: ignore[operator]
    return model


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    found = records(40, 1).batch(torch.arange(40))
    return found.inputs, found.labels


@pytest.mark.parametrize("through", ["linear", "soft", "surrogate", "exact"])
def test_each_attack_is_pgd_on_its_twin_judged_on_the_network(
    net: Any, batch: tuple[Tensor, Tensor], through: str
) -> None:
    """The same points as PGD finds on a copy whose head answers so, where these fool the network itself."""
    x, y = batch
    twin = copy.deepcopy(net)
    twin[1].through = through
    kind: Any = WnllTransfer if through in ("linear", "soft") else WnllPGD
    found = kind(THREAT, 5, through=through).run(net, x, y, generator=generator(0, "x"))
    with torch.no_grad():
        assert torch.equal(misclassified(net, x, y), torch.zeros(40, dtype=torch.bool))

    class Everywhere(PGD):
        def succeeds(self, model: Any, x_adv: Tensor, x: Tensor, y: Tensor) -> Tensor:
            return torch.ones_like(y, dtype=torch.bool)

    points = Everywhere(THREAT, 5).run(twin, x, y, generator=generator(0, "x")).x_adv
    assert torch.equal(found.broken, misclassified(net, points, y))
    assert torch.equal(found.x_adv[found.broken], points[found.broken])
    assert net[1].through == "exact"


def test_saturated_gradients_move_nothing_and_points_for_a_twin_do(net: Any, batch: tuple[Tensor, Tensor]) -> None:
    """Far inside its cluster a query's own gradient is zero: only a step by the twins leads out."""
    x, y = batch
    left = {}
    for attack in wnll_battery(net, THREAT):
        found = attack.run(net, x, y, generator=generator(0, "y"))
        left[vars(attack)["through"]] = float((~found.broken).float().mean())
    assert left["exact"] > 0.3
    assert max(left["linear"], left["soft"]) < 0.1


def test_the_battery_has_all_four_for_each_ball_and_none_for_other_networks(net: nn.Module) -> None:
    made = wnll_battery(net, THREAT)
    assert [vars(each)["through"] for each in made] == list(THROUGH)
    assert [each.gradient_free for each in made] == [False, False, True, True]
    assert all(vars(each)["restarts"] >= 5 and vars(each)["steps"] >= 20 for each in made)
    turned = RotationTranslation(shift=0.5, angle=10.0, shifts=3, angles=3)
    assert len(wnll_battery(net, Union((THREAT, L2(0.1), turned)))) == 8
    assert wnll_battery(nn.Linear(2, 2), THREAT) == ()


def test_other_networks_are_refused(batch: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(BadValue, match="the model has no WNLL output layer"):
        WnllPGD(THREAT).run(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), *batch)


def audited(net: nn.Module, *attacks: Attack) -> Findings:
    audit = Audit(THREAT, attacks=attacks, explanations=0, latency=(), curve=(THREAT.eps,), curve_points=20)
    return audit.run(net, records(40, 1), seed=0, name="x", source="memory")[0]


def test_an_audit_adds_the_attacks_it_was_not_asked_for_and_warns(net: nn.Module) -> None:
    """Asked for the surrogate alone, which such figures used to rest on, it still reports the worst case of all."""
    found = audited(net, WnllPGD(THREAT, 20, restarts=5, through="surrogate"))
    assert [each.label for each in found.attacks] == [
        "WNLL-PGD-20 x5 (ce, surrogate)",
        "WNLL-PGD-20 x5 (ce, exact)",
        "WNLL transfer-20 x5 (ce, linear)",
        "WNLL transfer-20 x5 (ce, soft)",
        "Logit-scaled PGD-20",  # all its weights are 1 or -1, as a quantised network's
    ]
    assert found.worst_case is not None
    assert found.worst_case.value < 0.1
    flags = {check.name: check.raised for check in found.checks}
    assert flags["zero_gradients"] is True
    assert flags["depends_on_batch"] is False


def test_the_flag_is_raised_where_twins_break_clearly_more() -> None:
    own, less = torch.ones(200, dtype=torch.bool), torch.ones(200, dtype=torch.bool)
    less[:30] = False
    (check,) = masking.of_transfers({"exact": own, "surrogate": own}, {"linear": own, "soft": less})
    assert (check.name, check.raised) == ("transfer_stronger", True)
    assert check.measured == {"points made for a twin, %": 85.0, "all attacks by the model's own gradients, %": 100.0}
    (check,) = masking.of_transfers({"exact": less}, {"linear": own})
    assert check.raised is False
    less[2:30] = True  # two points could have gone either way
    (check,) = masking.of_transfers({"exact": own}, {"linear": less})
    assert check.raised is False
    assert masking.of_transfers({"exact": own}, {}) == []
