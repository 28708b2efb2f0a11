"""PGD and FGSM against closed forms and against Foolbox."""

from __future__ import annotations

import warnings

import pytest
import torch
from closed_forms import Linear, Points
from torch import nn

from trivet.threats.attack import Attack, Target
from trivet.threats.l1 import L1
from trivet.threats.l2 import L2
from trivet.threats.linf import Linf
from trivet.threats.losses import margin
from trivet.threats.pgd import PGD, fgsm
from trivet.threats.threat import ThreatModel

DUAL = {"Linf": 1.0, "L2": 2.0, "L1": torch.inf}


def greatest_margin(model: Linear, x: torch.Tensor, y: torch.Tensor, threat: ThreatModel) -> torch.Tensor:
    """Of a two-class linear model: the margin at x plus eps times the dual norm, if the box is out of reach."""
    length = torch.linalg.vector_norm(model.weight[1] - model.weight[0], ord=DUAL[threat.norm])
    return margin(model(x), y) + threat.eps * length


@pytest.mark.parametrize(
    "attack",
    [
        fgsm(Linf(0.1)),
        fgsm(L2(0.3)),
        PGD(Linf(0.1), steps=20),
        PGD(L2(0.3), steps=50, step_size=0.3),
        PGD(L1(0.3, quantile=1.0), steps=30),
        PGD(Linf(0.1), steps=20, loss="margin", restarts=3),
    ],
    ids=lambda attack: f"{attack.threat.norm}-{attack.steps}",
)
def test_a_linear_model_is_driven_to_its_closed_form_worst_case(attack: Attack) -> None:
    model = Linear(2)
    x = 0.4 + 0.2 * torch.rand(16, 1, 4, 4)
    y = model(x).argmax(1)
    with torch.no_grad():
        found = margin(model(attack.search(Target(model, model), x, y, torch.Generator().manual_seed(0))), y)
        torch.testing.assert_close(found, greatest_margin(model, x, y, attack.threat), atol=2e-3, rtol=0)
        if isinstance(attack.threat, Linf):
            torch.testing.assert_close(found, greatest_margin(model, x, y, attack.threat), atol=2e-6, rtol=0)


@pytest.mark.parametrize("steps", [1, 10])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_foolbox_takes_the_same_steps(norm: str, steps: int, robust_net: nn.Module, test_points: Points) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import foolbox
    x, y = test_points.x[:50], test_points.y[:50]
    threat: ThreatModel = Linf(0.03) if norm == "Linf" else L2(0.2)
    theirs = {"Linf": foolbox.attacks.LinfPGD, "L2": foolbox.attacks.L2PGD}[norm](
        abs_stepsize=threat.eps / 4, steps=steps, random_start=False
    )
    wrapped = foolbox.PyTorchModel(robust_net, bounds=(0, 1), device="cpu")
    _, expected, _ = theirs(wrapped, x, y, epsilons=threat.eps)
    ours = PGD(threat, steps=steps, step_size=threat.eps / 4, random_start=False)
    found = ours.search(Target(robust_net, robust_net), x, y)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_restarts_attack_only_what_still_stands(plain_net: nn.Module, test_points: Points) -> None:
    rows: list[int] = []

    def counting(z: torch.Tensor) -> torch.Tensor:
        rows.append(len(z))
        return plain_net(z)

    x, y = test_points.x[:60], test_points.y[:60]
    one = PGD(Linf(0.08), steps=3, restarts=1).search(Target(counting, plain_net), x, y)
    standing = int((plain_net(one).argmax(1) == y).sum())
    rows.clear()
    PGD(Linf(0.08), steps=3, restarts=2).search(Target(counting, plain_net), x, y)
    assert rows[:3] == [60] * 3
    assert max(rows[3:]) < 60
    assert abs(rows[3] - standing) <= 6


def test_more_steps_and_more_radius_never_help_the_defender(robust_net: nn.Module, test_points: Points) -> None:
    x, y = test_points.x[:150], test_points.y[:150]
    by_radius = [int(PGD(Linf(eps), steps=10).run(robust_net, x, y).broken.sum()) for eps in (0.02, 0.06, 0.1, 0.2)]
    assert by_radius == sorted(by_radius)
    by_steps = [int(PGD(Linf(0.1), steps=steps).run(robust_net, x, y).broken.sum()) for steps in (1, 5, 40)]
    assert by_steps[0] <= by_steps[1] + 1 <= by_steps[2] + 2
