"""What every attack promises: verified finds, an untouched model, refusals, and sense at the ends of the radius."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from closed_forms import Linear, Points
from quick import QuickAutoAttack
from torch import Tensor, nn

from trivet.errors import BadValue
from trivet.threats.apgd import APGD, APGDT
from trivet.threats.attack import Attack, Target
from trivet.threats.autoattack import AutoAttack
from trivet.threats.boundary import Boundary
from trivet.threats.carlini_wagner import CarliniWagner
from trivet.threats.ead import EAD
from trivet.threats.fab import FAB, FABT
from trivet.threats.l1 import L1
from trivet.threats.l2 import L2
from trivet.threats.linf import Linf
from trivet.threats.logit_scaled import LogitScaledPGD
from trivet.threats.pgd import PGD, fgsm, random_fgsm
from trivet.threats.pointwise import Pointwise
from trivet.threats.slide import Slide
from trivet.threats.square import Square
from trivet.threats.threat import ThreatModel

ATTACKS: dict[str, Callable[[ThreatModel], Attack]] = {
    "fgsm": fgsm,
    "random_fgsm": random_fgsm,
    "pgd": lambda threat: PGD(threat, steps=5, restarts=2),
    "pgd_margin": lambda threat: PGD(threat, steps=5, loss="margin"),
    "apgd_ce": lambda threat: APGD(threat, steps=10),
    "apgd_dlr": lambda threat: APGD(threat, steps=10, loss="dlr", restarts=2),
    "apgd_t": lambda threat: APGDT(threat, steps=6, targets=4),
    "fab": lambda threat: FAB(threat, steps=5, restarts=2),
    "fab_t": lambda threat: FABT(threat, steps=6, targets=4),
    "square": lambda threat: Square(threat, queries=200),
    "logit_scaled": lambda threat: LogitScaledPGD(threat, steps=5),
    "autoattack": QuickAutoAttack,
    "carlini_wagner": lambda threat: CarliniWagner(threat, steps=20, searches=5, lr=0.05),
    "boundary": lambda threat: Boundary(threat, steps=300),
    "ead": lambda threat: EAD(threat, steps=10, searches=5),
    "slide": lambda threat: Slide(threat, steps=6, restarts=2),
    "pointwise": lambda threat: Pointwise(threat, restarts=3),
}
THREATS = {"linf": Linf(0.08), "l2": L2(0.4), "l1": L1(2.0)}
ONLY = {"carlini_wagner": "l2", "boundary": "l2", "ead": "l1", "slide": "l1", "pointwise": "l1"}
"""Attacks that know, or are made for, a single geometry."""

every_attack = pytest.mark.parametrize("name", ATTACKS)
every_attack_and_threat = pytest.mark.parametrize(
    ("name", "norm"), [(name, norm) for name in ATTACKS for norm in THREATS if ONLY.get(name, norm) == norm]
)


def aimed(name: str, radius: float) -> Attack:
    """The attack within l_inf `radius`, or, if it knows another geometry alone, within a ball of it as dangerous."""
    return ATTACKS[name](THREATS[ONLY.get(name, "linf")].scaled(radius / 0.08))


@every_attack_and_threat
def test_finds_are_in_the_set_and_misclassified_and_the_rest_is_as_it_was(
    name: str, norm: str, plain_net: nn.Module, test_points: Points
) -> None:
    threat, x = THREATS[norm], test_points.x[:40]
    y = test_points.y[:40].clone()
    y[:5] = (y[:5] + 1) % 10  # wrong without attack
    x_adv, broken = ATTACKS[name](threat).run(plain_net, x, y, batch_size=16)
    wrong = plain_net(x_adv).argmax(1) != y
    assert torch.equal(wrong, broken)
    assert bool(threat.contains(x_adv, x).all())
    assert torch.equal(x_adv[~broken], x[~broken])
    assert torch.equal(x_adv[:5], x[:5])
    assert int(broken[5:].sum()) >= (1 if name in ("fgsm", "random_fgsm", "square", "boundary") else 4)


class Scribbler(nn.Module):
    """A model whose every sub-module could be left in a state it was not found in; fails at a given call."""

    def __init__(self, fails_at: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
        self.body[1].eval()
        self.fails_at, self.calls = fails_at, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.fails_at:
            raise RuntimeError("the model fails")
        return self.body(x)


@every_attack
@pytest.mark.parametrize("fails_at", [0, 2])
def test_the_model_and_the_global_stream_are_as_before_also_after_an_error(name: str, fails_at: int) -> None:
    torch.manual_seed(0)
    model = Scribbler(fails_at).train()
    model.body[1].eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.body[4].weight.requires_grad_(False)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    stream = torch.get_rng_state()
    x, y = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3
    with torch.no_grad():
        y[:4] = model.body.eval()(x[:4]).argmax(1)
        model.body.train()
        model.body[1].eval()
    if fails_at:
        with pytest.raises(RuntimeError, match="the model fails"):
            aimed(name, 0.5).run(model, x, y)
    else:
        aimed(name, 0.5).run(model, x, y)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    for parameter in model.parameters():
        torch.testing.assert_close(parameter.grad, torch.ones_like(parameter))
    assert torch.equal(torch.get_rng_state(), stream)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x * 2, "must lie in"),
        (lambda x: x - 0.01, "must lie in"),
        (lambda x: x.masked_fill(x > 0.9, torch.nan), "must lie in"),
        (lambda x: x[:3], "3 inputs but 40 labels"),
    ],
)
@pytest.mark.parametrize("name", ["pgd", "autoattack"])
def test_inputs_that_are_no_images_are_refused(
    name: str, spoil: Callable[[Tensor], Tensor], message: str, plain_net: nn.Module, test_points: Points
) -> None:
    attack = ATTACKS[name](Linf(0.1))
    with pytest.raises(BadValue, match=message):
        attack.run(plain_net, spoil(test_points.x[:40]), test_points.y[:40])


@every_attack_and_threat
def test_a_radius_of_zero_leaves_clean_accuracy(
    name: str, norm: str, plain_net: nn.Module, test_points: Points
) -> None:
    x, y = test_points.x[:25], test_points.y[:25]
    x_adv, broken = ATTACKS[name](THREATS[norm].scaled(0.0)).run(plain_net, x, y)
    assert torch.equal(broken, plain_net(x).argmax(1) != y)
    assert torch.equal(x_adv, x)


@pytest.mark.parametrize("name", ["pgd", "apgd_ce", "apgd_t", "fab_t", "autoattack"])
def test_a_radius_of_the_whole_range_leaves_nothing(name: str, robust_net: nn.Module, test_points: Points) -> None:
    _, broken = ATTACKS[name](Linf(1.0)).run(robust_net, test_points.x[:40], test_points.y[:40])
    assert int((~broken).sum()) <= 1


@every_attack
@pytest.mark.parametrize("classes", [2, 3, 4])
def test_few_classes_are_attacked_like_many(name: str, classes: int) -> None:
    model = Linear(classes)
    x = 0.3 + 0.4 * torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(1)
    norm = ONLY.get(name, "linf")
    reach = model.distances(x, y, THREATS[norm].norm).amin(1)
    radius = float(reach.quantile(0.5)) * (4 if name in ("square", "pointwise") else 1.5)
    _, broken = ATTACKS[name](replace(THREATS[norm], eps=radius)).run(model, x, y)
    assert int(broken.sum()) >= 10


@every_attack
def test_the_same_generator_gives_the_same_finds(name: str, plain_net: nn.Module, test_points: Points) -> None:
    x, y = test_points.x[:15], test_points.y[:15]
    runs = [
        aimed(name, 0.05).run(plain_net, x, y, generator=torch.Generator().manual_seed(seed)).x_adv for seed in (3, 3)
    ]
    assert torch.equal(*runs)
    default = [aimed(name, 0.05).run(plain_net, x, y).x_adv for _ in range(2)]
    assert torch.equal(*default)


@every_attack
def test_batches_of_any_size_give_results_of_the_same_kind(
    name: str, plain_net: nn.Module, test_points: Points
) -> None:
    x, y = test_points.x[:60], test_points.y[:60]
    counts = []
    for batch_size in (7, 512):
        x_adv, broken = aimed(name, 0.08).run(plain_net, x, y, batch_size=batch_size)
        assert torch.equal(plain_net(x_adv).argmax(1) != y, broken)
        counts.append(int(broken.sum()))
    assert abs(counts[0] - counts[1]) <= (0 if name == "fgsm" else 5)


@every_attack
def test_an_empty_batch_is_attacked_without_complaint(name: str, plain_net: nn.Module) -> None:
    x_adv, broken = aimed(name, 0.1).run(plain_net, torch.rand(0, 1, 8, 8), torch.zeros(0, dtype=torch.long))
    assert x_adv.shape == (0, 1, 8, 8)
    assert broken.shape == (0,)


@dataclass(frozen=True)
class Cheat(Attack):
    """Proposes points that fool the model from outside the set."""

    def search(self, model: Target, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.rand_like(x)


def test_finds_outside_the_set_do_not_count(plain_net: nn.Module, test_points: Points) -> None:
    x, y = test_points.x[:30], test_points.y[:30]
    assert int((plain_net(torch.rand_like(x)).argmax(1) != y).sum()) > 10
    _, broken = Cheat(Linf(0.01)).run(plain_net, x, y)
    assert torch.equal(broken, plain_net(x).argmax(1) != y)


@pytest.mark.parametrize("name", ["pgd", "apgd_ce", "apgd_t", "fab_t", "square"])
def test_success_is_judged_on_the_model_itself_when_gradients_are_bf16(
    name: str, plain_net: nn.Module, test_points: Points
) -> None:
    attack = replace(ATTACKS[name](Linf(0.06)), precision="bf16")
    x, y = test_points.x[:60], test_points.y[:60]
    x_adv, broken = attack.run(plain_net, x, y)
    assert torch.equal(plain_net(x_adv).argmax(1) != y, broken)
    full = ATTACKS[name](Linf(0.06)).run(plain_net, x, y).broken
    assert abs(int(broken.sum()) - int(full.sum())) <= 4


class Cliff(nn.Module):
    """Logits that are not numbers above a brightness, and a large constant lead below it."""

    def forward(self, x: Tensor) -> Tensor:
        bright = x.flatten(1).mean(1, keepdim=True)
        return torch.cat((torch.where(bright > 0.6, torch.nan, 1 - bright), bright - 1), 1)


@pytest.mark.parametrize("name", ["apgd_ce", "square"])
def test_logits_that_are_not_finite_count_as_broken(name: str) -> None:
    x = torch.full((4, 1, 4, 4), 0.55)
    _, broken = ATTACKS[name](Linf(0.2)).run(Cliff(), x, torch.zeros(4, dtype=torch.long))
    assert bool(broken.all())


def test_settings_out_of_range_are_refused_by_name() -> None:
    ball = Linf(0.1)
    cases: list[tuple[Callable[[], Attack], str]] = [
        (lambda: PGD(ball, steps=0), "steps=0"),
        (lambda: APGD(ball, restarts=0), "restarts=0"),
        (lambda: APGD(ball, samples=0), "samples=0"),
        (lambda: APGD(ball, rho=2.0), "rho=2"),
        (lambda: APGDT(ball, targets=0), "targets=0"),
        (lambda: FABT(ball, overshoot=0.5), "overshoot=0.5"),
        (lambda: FAB(ball, backward=0.0), "backward=0"),
        (lambda: Square(ball, p_init=0.0), "p_init=0"),
        (lambda: AutoAttack(ball, version="fast"), "version='fast'"),  # type: ignore[arg-type]
        (lambda: AutoAttack(ball, eot=0), "eot=0"),
    ]
    for make, message in cases:
        with pytest.raises(BadValue, match=message):
            make()


def test_square_wants_images() -> None:
    model = nn.Linear(5, 2)
    with pytest.raises(BadValue, match="images"):
        Square(Linf(0.1), queries=3).run(model, torch.rand(3, 5), model(torch.rand(3, 5)).argmax(1))
