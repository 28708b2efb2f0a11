"""Auto-PGD against closed forms, against the paper's algorithm written out for one example, and the authors' code."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from closed_forms import Linear, Points
from torch import Tensor, nn

from trivet.threats.apgd import APGD, APGDT
from trivet.threats.attack import Attack, Target
from trivet.threats.l1 import L1
from trivet.threats.l2 import L2
from trivet.threats.linf import Linf
from trivet.threats.losses import cross_entropy, margin
from trivet.threats.threat import ThreatModel

DUAL = {"Linf": 1.0, "L2": 2.0, "L1": torch.inf}


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.3)], ids=lambda t: t.norm)
@pytest.mark.parametrize("make", [APGD, APGDT, lambda threat: APGD(threat, loss="dlr")])
def test_a_linear_model_is_driven_to_its_closed_form_worst_case(
    make: Callable[[ThreatModel], Attack], threat: ThreatModel
) -> None:
    model = Linear(2)
    model.bias.data[0] = 5.0  # nobody falls, so that the ascent runs to its end
    x = 0.4 + 0.2 * torch.rand(12, 1, 4, 4)
    y = torch.zeros(12, dtype=torch.long)
    length = torch.linalg.vector_norm(model.weight[1] - model.weight[0], ord=DUAL[threat.norm])
    target = Target(model, model)
    with torch.no_grad():
        found = margin(model(make(threat).search(target, x, y, torch.Generator().manual_seed(0))), y)
        best = margin(model(x), y) + threat.eps * length
    torch.testing.assert_close(found, best, atol=1e-4, rtol=0)


@pytest.mark.parametrize("make", [APGD, APGDT])
def test_sparse_steps_find_the_pixels_that_count_most(make: Callable[[ThreatModel], Attack]) -> None:
    model, threat = Linear(2, side=12), L1(1.0)
    model.bias.data[0] = 8.0
    x = torch.rand(6, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    found = make(threat).search(Target(model, model), x, torch.zeros(6, dtype=torch.long))
    slope = (model.weight[1] - model.weight[0]).detach()
    room = torch.where(slope > 0, 1 - x.flatten(1), x.flatten(1))
    order = slope.abs().argsort(descending=True)
    spent = (1.0 - (room[:, order].cumsum(1) - room[:, order])).clamp(min=0).minimum(room[:, order])
    best = (spent * slope.abs()[order]).sum(1)  # the budget goes to the steepest pixels, up to the box
    gain = (found - x).flatten(1) @ slope
    assert bool((gain > 0.9 * best).all())
    assert bool((gain < best + 1e-4).all())


def one_ascent(model: nn.Module, x: Tensor, y: Tensor, start: Tensor, threat: ThreatModel, steps: int) -> Tensor:
    """Algorithm 1 of Croce & Hein 2020 for one example, line by line; the point of highest loss."""

    def loss_and_gradient(point: Tensor) -> tuple[float, Tensor]:
        point = point.clone().requires_grad_()
        loss = cross_entropy(model(point), y).sum()
        return loss.item(), torch.autograd.grad(loss, point)[0]

    def direction(gradient: Tensor) -> Tensor:
        return gradient.sign() if threat.norm == "Linf" else gradient / gradient.norm()

    checkpoints, gap = [max(int(0.22 * steps), 1)], max(int(0.22 * steps), 1)
    while checkpoints[-1] < steps:
        gap = max(gap - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
        checkpoints.append(checkpoints[-1] + gap)
    eta, points, losses, gradients = 2 * threat.eps, [start], [], []
    loss, gradient = loss_and_gradient(start)
    losses.append(loss)
    gradients.append(gradient)
    best, reduced, best_then, last_check, rises = 0, True, loss, 0, 0
    current, previous, gradient = start, start, gradients[0]
    for step in range(1, steps + 1):
        z = threat.project(current + eta * direction(gradient), x)
        if step > 1:
            z = threat.project(current + 0.75 * (z - current) + 0.25 * (current - previous), x)
        previous, current = current, z
        loss, gradient = loss_and_gradient(current)
        rises += loss > losses[-1]
        points.append(current)
        losses.append(loss)
        gradients.append(gradient)
        if loss > losses[best]:
            best = step
        if step in checkpoints:
            stalled = not reduced and losses[best] == best_then
            reduced = rises <= 0.75 * (step - last_check) or stalled
            if reduced:
                eta, current, gradient = eta / 2, points[best], gradients[best]
            best_then, last_check, rises = losses[best], step, 0
    return points[best]


@pytest.mark.parametrize("threat", [Linf(0.02), L2(0.1)], ids=lambda t: t.norm)
def test_the_batched_ascent_is_the_papers_algorithm_example_by_example(
    threat: ThreatModel, train_points: Points
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).double()
    x = train_points.x[:10].double()
    y = net(x).argmax(1)
    keep = threat.scaled(3.0)
    steady = [i for i in range(10) if bool((net(keep.random_start(x)).argmax(1) == y)[i])]
    x, y = x[steady], y[steady]
    start = threat.random_start(x, torch.Generator().manual_seed(7))
    found = APGD(threat, steps=60).search(Target(net, net), x, y, torch.Generator().manual_seed(7))
    rows = [i for i in range(len(x)) if int(net(found[i : i + 1]).argmax()) == int(y[i])]  # broken ones stop early
    assert len(rows) >= 4
    for i in rows:
        one = slice(i, i + 1)
        expected = one_ascent(net, x[one], y[one], start[one], threat, 60)
        torch.testing.assert_close(found[one], expected, atol=1e-9, rtol=0)


def test_beaten_points_leave_the_batch(plain_net: nn.Module, test_points: Points) -> None:
    sizes: list[int] = []

    def counting(z: Tensor) -> Tensor:
        sizes.append(len(z))
        return plain_net(z)

    x, y = test_points.x[:60], test_points.y[:60]
    right = plain_net(x).argmax(1) == y
    APGD(Linf(0.1), steps=30).search(Target(counting, plain_net), x[right], y[right])
    assert sizes[0] == int(right.sum())
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 0.7 * sizes[0]


def test_queries_keep_to_the_batch_size_although_targets_multiply_the_points(
    robust_net: nn.Module, test_points: Points
) -> None:
    sizes: list[int] = []

    def counting(z: Tensor) -> Tensor:
        sizes.append(len(z))
        return robust_net(z)

    x, y = test_points.x[:20], test_points.y[:20]
    APGDT(Linf(0.03), steps=3).search(Target(counting, robust_net, batch_size=32), x, y)
    assert max(sizes) == 32
    assert sum(size > 20 for size in sizes) >= 8  # the nine targets are fused


def test_a_find_of_the_stand_in_that_the_model_denies_does_not_end_the_search(robust_net: nn.Module) -> None:
    calls = 0

    def fooled_at_once(z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return robust_net(z).roll(1, dims=1)

    x = torch.rand(5, 1, 8, 8)
    y = robust_net(x).argmax(1)
    APGD(Linf(1e-4), steps=7).search(Target(fooled_at_once, robust_net), x, y)
    assert calls == 8


def test_the_best_point_is_returned_where_none_is_adversarial(robust_net: nn.Module, test_points: Points) -> None:
    x = test_points.x[:30]
    y = robust_net(x).argmax(1)
    threat = Linf(0.01)
    start = threat.random_start(x, torch.Generator().manual_seed(1))
    found = APGD(threat, steps=20).search(Target(robust_net, robust_net), x, y, torch.Generator().manual_seed(1))
    with torch.no_grad():
        standing = robust_net(found).argmax(1) == y
        gain = cross_entropy(robust_net(found), y) - cross_entropy(robust_net(start), y)
    assert int(standing.sum()) > 20
    assert bool((gain[standing] > 0).all())


class Noisy(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + 0.15 * torch.randn_like(x))


def test_averaging_draws_makes_attacks_on_a_randomised_model_stronger(
    robust_net: nn.Module, test_points: Points
) -> None:
    model, x, y = Noisy(robust_net), test_points.x[:150], test_points.y[:150]

    def left(samples: int) -> float:
        attack = APGD(Linf(0.1), steps=15, samples=samples)
        found = attack.search(Target(model, model), x, y, torch.Generator().manual_seed(0))
        with torch.no_grad():
            votes = torch.stack([model(found).argmax(1) == y for _ in range(20)])
        return float(votes.float().mean())

    assert left(10) < left(1)


@pytest.mark.slow
@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("threat", [Linf(0.08), L2(0.4), L1(2.0)], ids=lambda t: t.norm)
def test_the_authors_code_leaves_as_many_points(threat: ThreatModel, plain_net: nn.Module, test_points: Points) -> None:
    from autoattack.autopgd_base import APGDAttack, APGDAttack_targeted

    x, y = test_points.x[:200], test_points.y[:200]
    sparse = threat.norm == "L1"
    settings = {"norm": threat.norm, "eps": threat.eps, "use_largereps": sparse}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = {
            "ce": APGDAttack(plain_net, loss="ce", **settings).perturb(x, y),
            "t": APGDAttack_targeted(plain_net, n_target_classes=5, **settings).perturb(x, y),
        }
    for name, attack in {"ce": APGD(threat), "t": APGDT(threat, targets=5)}.items():
        expected = float((plain_net(theirs[name]).argmax(1) == y).float().mean())
        same_stream = torch.Generator().manual_seed(0)
        left = float((~attack.run(plain_net, x, y, generator=same_stream).broken).float().mean())
        assert left == pytest.approx(expected, abs=0.03 if sparse else 0.011)  # one l_1 run varies by points
