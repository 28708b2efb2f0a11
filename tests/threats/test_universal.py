"""Universal perturbations: the closed form of a linear model, the published loop one target at a time, and the ends."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from closed_forms import Linear, Points
from hypothesis import given, settings
from torch import Tensor, nn

from trivet.errors import BadValue
from trivet.threats.attack import Target
from trivet.threats.l1 import L1
from trivet.threats.l2 import L2
from trivet.threats.linf import Linf
from trivet.threats.losses import cross_entropy
from trivet.threats.pgd import PGD
from trivet.threats.universal import TargetedUniversal, UniversalSearch, inside, moved, success_of


def centred(count: int, side: int = 4, reach: float = 0.2) -> Tensor:
    """Records so far from the ends of [0, 1] that no perturbation up to 0.3 meets them."""
    return 0.5 + reach * (2 * torch.rand(count, 1, side, side, generator=torch.Generator().manual_seed(3)) - 1)


def test_between_two_classes_of_a_linear_model_it_finds_the_best_perturbation() -> None:
    """max of the share with w.(x + v) > 0 over ||v||_inf <= eta is at v = eta sign(W_t - W_y)."""
    model, x = Linear(2), centred(50)
    with torch.no_grad():
        model.bias[0] += 0.2 + (model(x)[:, 1] - model(x)[:, 0]).mean()
    y, w = torch.zeros(50, dtype=torch.long), (model.weight[1] - model.weight[0]).detach()
    search = UniversalSearch(Linf(0.05), targets=(1,), passes=2, enough=1.0)
    found = search.perturbations(model, x, y, torch.Generator().manual_seed(0))
    best = 0.05 * w.sign().view(1, 4, 4)
    torch.testing.assert_close(found.deltas[0], best, atol=1e-6, rtol=0)
    share = float((model(x + best).argmax(1) == 1).double().mean())
    assert 0.2 < share < 0.9  # neither nothing nor everything could be reached
    assert float(found.success[0]) == share
    assert float(success_of(found, model, x, y, Linf(0.05))[0]) == share


@pytest.mark.parametrize("threat", [Linf(0.25), L2(0.9)], ids=["Linf", "L2"])
def test_all_targets_at_once_is_the_loop_one_target_and_record_after_the_other(threat, plain_net, train_points) -> None:
    x, y = train_points.x[:30], train_points.y[:30]
    search = UniversalSearch(threat, targets=(3, 0, 8), passes=2, steps=4, enough=0.9)
    found = search.perturbations(plain_net, x, y, torch.Generator().manual_seed(5))

    draw = torch.Generator().manual_seed(5)
    deltas = {target: torch.zeros(1, 8, 8) for target in (3, 0, 8)}
    kept = {target: (share(plain_net, x, y, target, deltas[target]), deltas[target]) for target in deltas}
    for _ in range(2):
        moving = [target for target in deltas if kept[target][0] < 0.9]
        orders = {target: (y != target).nonzero().squeeze(1) for target in moving}
        orders = {target: order[torch.randperm(len(order), generator=draw)] for target, order in orders.items()}
        for target in moving:
            for record in orders[target]:
                deltas[target] = one_record(plain_net, threat, x[record], deltas[target], target, threat.eps / 5, 4)
            reached = share(plain_net, x, y, target, deltas[target])
            if reached >= kept[target][0]:
                kept[target] = reached, deltas[target]
    for target, delta, success in zip((3, 0, 8), found.deltas, found.success, strict=True):
        torch.testing.assert_close(delta, kept[target][1], atol=1e-5, rtol=0)
        assert float(success) == pytest.approx(kept[target][0], abs=1e-9)
    assert max(kept[target][0] for target in kept) > 0.3


def share(model: nn.Module, x: Tensor, y: Tensor, target: int, delta: Tensor) -> float:
    others = x[y != target]
    return float((model((others + delta).clamp(0, 1)).argmax(1) == target).double().mean())


def one_record(model, threat, x: Tensor, delta: Tensor, target: int, length: float, steps: int) -> Tensor:
    """Targeted iterative FGSM (or its l_2 form) on one record, written out."""
    for _ in range(steps):
        point = (x + delta).clamp(0, 1)[None].requires_grad_()
        logits = model(point)
        if int(logits.argmax()) == target:
            break
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(logits, torch.tensor([target])), point)
        if threat.norm == "Linf":
            delta = (delta - length * gradient[0].sign()).clamp(-threat.eps, threat.eps)
        else:
            delta = delta - length * gradient[0] / gradient.norm()
            delta = delta * min(1.0, threat.eps / float(delta.norm()))
    return delta


def test_on_one_record_it_is_targeted_iterative_fgsm(plain_net: nn.Module, test_points: Points) -> None:
    x, y, threat = test_points.x[:1], test_points.y[:1], Linf(0.3)
    target = (int(y) + 1) % 10
    found = UniversalSearch(threat, (target,), passes=1, steps=8, step_size=0.04).perturbations(plain_net, x, y)
    expected = one_record(plain_net, threat, x[0], torch.zeros(1, 8, 8), target, 0.04, 8)
    torch.testing.assert_close(found.deltas[0], expected, atol=1e-6, rtol=0)
    assert float(expected.abs().max()) > 0.03
    assert float(found.success[0]) == float(plain_net((x + expected).clamp(0, 1)).argmax(1) == target)


@pytest.mark.parametrize("search", [UniversalSearch(Linf(0.0), passes=1), UniversalSearch(L2(0.3), passes=0)])
def test_without_radius_or_passes_it_is_the_natural_confusion(search, plain_net, train_points) -> None:
    x, y = train_points.x[:80], torch.randint(10, (80,), generator=torch.Generator().manual_seed(0))
    found = search.perturbations(plain_net, x, y)
    predicted = plain_net(x).argmax(1)
    expected = [float((predicted[y != target] == target).double().mean()) for target in range(10)]
    assert torch.equal(found.deltas, torch.zeros(10, 1, 8, 8))
    assert found.success.tolist() == pytest.approx(expected, abs=1e-12)
    assert max(expected) > 0.1


@given(
    delta=st.lists(st.floats(-3, 3, width=32), min_size=8, max_size=8),
    eps=st.floats(0, 1),
    threat=st.sampled_from([Linf, L2]),
)
@settings(max_examples=200, deadline=None)
def test_a_perturbation_put_inside_is_no_longer_than_eps_and_short_ones_stay(delta, eps, threat) -> None:
    before = torch.tensor(delta).view(2, 1, 2, 2)
    after = inside(threat(eps), before)
    order = torch.inf if threat is Linf else 2
    lengths = torch.linalg.vector_norm(after.double().flatten(1), ord=order, dim=1)
    assert bool((lengths <= eps).all())
    was = torch.linalg.vector_norm(before.double().flatten(1), ord=order, dim=1)
    torch.testing.assert_close(lengths, was.clamp(max=eps), atol=1e-5, rtol=1e-5)
    short = before[was < 0.99 * eps]
    torch.testing.assert_close(after[was < 0.99 * eps], short, atol=1e-5, rtol=1e-5)


def test_it_does_far_more_than_random_signs_and_the_more_the_longer_it_is(
    plain_net: nn.Module, train_points: Points, test_points: Points
) -> None:
    x, y = train_points.x[:60], train_points.y[:60]
    held = []
    for eps in (0.05, 0.15, 0.3):
        threat = Linf(eps)
        found = UniversalSearch(threat, passes=1).perturbations(plain_net, x, y, torch.Generator().manual_seed(0))
        assert float(found.deltas.abs().max()) <= eps
        held.append(float(success_of(found, plain_net, test_points.x, test_points.y, threat).mean()))
        signs = found._replace(deltas=eps * torch.randn(10, 1, 8, 8).sign())
        random = float(success_of(signs, plain_net, test_points.x, test_points.y, threat).mean())
    assert held == sorted(held)
    assert held[-1] > 0.5
    assert random < 0.5 * held[-1]


class Watched(nn.Module):
    """Notes the least and the greatest input it is asked about."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.least, self.most = inner, 0.0, 1.0

    def forward(self, x: Tensor) -> Tensor:
        self.least, self.most = min(self.least, float(x.detach().min())), max(self.most, float(x.detach().max()))
        return self.inner(x)


def test_the_model_is_asked_about_inputs_in_the_unit_box_alone(plain_net: nn.Module, train_points: Points) -> None:
    watched, x, y = Watched(plain_net), train_points.x[:20], train_points.y[:20]
    found = UniversalSearch(Linf(0.3), passes=1).perturbations(watched, x, y)
    success_of(found, watched, x, y, Linf(0.3))
    assert (watched.least, watched.most) == (0.0, 1.0)
    assert bool((found.deltas[:, None] + x < 0).any())


def test_records_of_the_target_class_do_not_count(plain_net: nn.Module, test_points: Points) -> None:
    of_three = test_points.y == 3
    found = UniversalSearch(Linf(0.1), (3,)).perturbations(plain_net, test_points.x[of_three], test_points.y[of_three])
    assert float(plain_net(test_points.x[of_three]).argmax(1).eq(3).double().mean()) > 0.9
    assert found.success.tolist() == [0.0]
    assert not bool(found.deltas.any())


def test_the_critical_part_is_what_lies_nearest_the_targets_boundary(plain_net: nn.Module, test_points: Points) -> None:
    x, y = test_points
    with torch.no_grad():
        logits = plain_net(x)
    chosen = UniversalSearch(Linf(0.1), top_fraction_by_margin=0.25).critical(logits, y, 8)
    gaps = sorted((float(logits[i, y[i]] - logits[i, 8]), i) for i in range(len(y)) if int(y[i]) != 8)
    assert chosen.tolist() == sorted(i for _, i in gaps[: -(-len(gaps) // 4)])


def test_as_an_attack_it_keeps_of_each_record_the_perturbation_that_misleads(robust_net, test_points) -> None:
    x, y = test_points.x[:120], test_points.y[:120]
    threat = Linf(0.25)
    outcome = TargetedUniversal(threat, passes=2).run(robust_net, x, y, generator=torch.Generator().manual_seed(2))
    right = robust_net(x).argmax(1) == y
    found = TargetedUniversal(threat, passes=2).perturbations(
        Target(robust_net, robust_net), x[right], y[right], torch.Generator().manual_seed(2)
    )
    fell = torch.stack([robust_net(moved(threat, x, delta)).argmax(1) != y for delta in found.deltas]).any(0)
    assert torch.equal(outcome.broken, fell | ~right)
    assert float(fell.double().mean()) > 0.1
    single = PGD(threat, 10).run(robust_net, x, y).broken
    assert int(single.sum()) >= int(outcome.broken.sum())


def test_the_search_descends_the_loss_towards_the_target(plain_net: nn.Module, train_points: Points) -> None:
    x, y = train_points.x[:60], train_points.y[:60]
    found = UniversalSearch(Linf(0.1), (5,), passes=1, enough=1.0).perturbations(plain_net, x, y)
    towards = torch.full((60,), 5)
    after, before = (cross_entropy(plain_net(each), towards).mean() for each in (x + found.deltas[0], x))
    assert after < before - 1


@pytest.mark.parametrize(
    ("threat", "wrong", "message"),
    [
        (L1(2.0), {}, "l_inf or an l_2 ball"),
        (Linf(0.1), {"targets": (1, 1)}, "targets="),
        (Linf(0.1), {"targets": (-1,)}, "targets="),
        (Linf(0.1), {"passes": -1}, "passes="),
        (Linf(0.1), {"steps": 0}, "steps="),
        (Linf(0.1), {"step_size": -1.0}, "step_size="),
        (Linf(0.1), {"enough": 0.0}, "enough="),
        (Linf(0.1), {"top_fraction_by_margin": 0.0}, "top_fraction_by_margin="),
    ],
)
def test_wrong_settings_are_refused_by_name(threat, wrong, message) -> None:
    with pytest.raises(BadValue, match=message):
        TargetedUniversal(threat, **wrong)


def test_a_target_that_the_model_does_not_know_is_refused(plain_net: nn.Module, test_points: Points) -> None:
    with pytest.raises(BadValue, match="classes below 10"):
        UniversalSearch(Linf(0.1), (10,)).perturbations(plain_net, *test_points)
