"""What certified training shares: schedules, robust cross-entropy, BatchNorm, the warm-up regularizer, its judge."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from interval_rules import ball, by_hand, worst_loss
from torch import nn

from trivet.certify.bounds.interval import Interval
from trivet.data.dataset import Batch
from trivet.errors import BadValue
from trivet.models.cnn7 import cnn7
from trivet.objectives.certified import network_of, robust_cross_entropy, smooth
from trivet.objectives.ibp import Ibp
from trivet.objectives.objective import Objective, Progress
from trivet.objectives.sabr import Sabr
from trivet.objectives.single_prop import SingleProp
from trivet.objectives.warm_up import warm_up_penalty
from trivet.threats.l2 import L2
from trivet.threats.linf import Linf

END = Progress(step=9, steps=10, epoch=9.0, seed=7)
START = Progress(step=0, steps=10, epoch=0.0, seed=7)


def at(fraction: float) -> Progress:
    return Progress(round(fraction * 1000), 1000, 0.0, 0)


def test_the_radius_grows_linearly_and_the_clean_share_falls_with_it() -> None:
    objective = Ibp(Linf(0.1), train_eps=0.2, ramp=(0.2, 0.6), kappa_end=0.3)
    moments = [at(fraction) for fraction in (0.0, 0.2, 0.3, 0.4, 0.6, 0.9)]
    assert [objective.grown(each) * objective.eps_max for each in moments] == pytest.approx([0, 0, 0.05, 0.1, 0.2, 0.2])
    assert [objective.kappa(each) for each in moments] == pytest.approx([1, 1, 0.825, 0.65, 0.3, 0.3])


def test_a_smooth_ramp_starts_as_a_fourth_power_meets_its_tangent_and_ends_at_one() -> None:
    """With T = 1: a t^4 up to 1/4, where a = 1 / (3/4 * 4 / 64 + 1/256)."""
    a = 1 / (3 / 64 + 1 / 256)
    assert smooth(0.0) == 0.0
    assert smooth(0.125) == pytest.approx(a * 0.125**4)
    assert smooth(0.25) == pytest.approx(a / 256)
    slopes = [(smooth(0.25 + step) - smooth(0.25)) / step for step in (-1e-6, 1e-6, 0.7)]
    assert slopes == pytest.approx([a / 16] * 3, rel=1e-4)
    assert smooth(1.0) == pytest.approx(1.0)
    objective = Ibp(Linf(0.1), ramp=(0.2, 0.6), ramp_shape="smooth")
    assert objective.grown(at(0.3)) == pytest.approx(smooth(0.25))


def test_a_ramp_of_no_length_is_a_step() -> None:
    objective = Ibp(Linf(0.1), ramp=(0.5, 0.5))
    assert [objective.grown(at(fraction)) for fraction in (0.0, 0.499, 0.5, 0.9)] == [0, 0, 1, 1]


def test_the_robust_cross_entropy_is_the_log_of_one_plus_the_exponentials() -> None:
    lower = torch.tensor([[1.0, -2.0, 0.5], [-300.0, 200.0, 0.0]])
    first = math.log(1 + math.exp(-1.0) + math.exp(2.0) + math.exp(-0.5))
    torch.testing.assert_close(robust_cross_entropy(lower), torch.tensor([first, 300.0]))


def test_the_loss_of_interval_bounds_is_passed_by_no_corner_of_the_box(rectified, exact_batch) -> None:
    """IBP's does; 500 corners try to pass it."""
    objective = Ibp(Linf(0.1), kappa_end=0.0)
    bound = objective(rectified, exact_batch, END).per_example
    lower, upper = ball(exact_batch, 0.1)
    for _ in range(500):
        points = lower + (upper - lower) * torch.rand_like(lower).round()
        losses = nn.functional.cross_entropy(rectified(points), exact_batch.labels, reduction="none")
        assert (losses <= bound).all()


@pytest.mark.parametrize("objective", [Ibp(Linf(0.1)), SingleProp(Linf(0.1)), Sabr(Linf(0.1), steps=1)], ids=str)
def test_the_warm_up_is_plain_training_and_costs_no_bounds(objective: Objective, convnet, batch, monkeypatch) -> None:
    monkeypatch.setattr("trivet.objectives.certified.network_of", None)
    monkeypatch.setattr("trivet.objectives.single_prop.network_of", None)
    objective = type(objective)(Linf(0.1), ramp=(0.5, 0.9))
    plain = nn.functional.cross_entropy(copy.deepcopy(convnet)(batch.inputs), batch.labels, reduction="none")
    torch.testing.assert_close(objective(convnet, batch, START).per_example, plain)


def folded(net: nn.Sequential, x: torch.Tensor) -> nn.Sequential:
    """A convolution with its BatchNorm at the statistics of `x`, as one convolution."""
    first, norm = net[0], net[1]
    values = first(x)
    mean, variance = values.mean((0, 2, 3)), values.var((0, 2, 3), correction=0)
    factor = norm.weight / (variance + norm.eps).sqrt()
    one = nn.Conv2d(2, 6, 3, padding=1).to(x.dtype)
    del one.weight, one.bias
    one.weight, one.bias = first.weight * factor.view(-1, 1, 1, 1), (first.bias - mean) * factor + norm.bias
    return nn.Sequential(one, *net[2:])


@pytest.mark.parametrize("frozen", [False, True])
def test_bounds_use_the_statistics_of_the_clean_batch_with_their_gradient(frozen, convnet, exact_batch) -> None:
    """Against the network whose BatchNorm is folded by hand into the convolution; frozen ones keep their own."""
    from interval_rules import merged_margins

    net = convnet.double()
    net[1].eval() if frozen else None
    net[1].weight.data = torch.tensor([1.5, -0.5, 1.0, 2.0, -1.0, 0.3]).double()
    running = net[1].running_mean.clone()
    by_engine = Ibp(Linf(0.05), kappa_end=0.4)(net, exact_batch, END).per_example
    assert torch.equal(net[1].running_mean, running) == frozen
    if frozen:
        with torch.no_grad():
            factor = net[1].weight / (net[1].running_var + net[1].eps).sqrt()
            one = nn.Conv2d(2, 6, 3, padding=1).double()
            one.weight.copy_(net[0].weight * factor.view(-1, 1, 1, 1))
            one.bias.copy_((net[0].bias - net[1].running_mean) * factor + net[1].bias)
        twin = nn.Sequential(one, *net[2:])
    else:
        twin = folded(net, exact_batch.inputs)
    margins = merged_margins(twin, *ball(exact_batch, 0.05), exact_batch.labels)
    clean = nn.functional.cross_entropy(twin(exact_batch.inputs), exact_batch.labels, reduction="none")
    expected = 0.4 * clean + 0.6 * worst_loss(margins)
    torch.testing.assert_close(by_engine, expected)
    if not frozen:
        ours, theirs = (torch.autograd.grad(each.mean(), net[0].weight)[0] for each in (by_engine, expected))
        torch.testing.assert_close(ours, theirs)


def test_running_statistics_move_once_in_a_step_however_many_passes_it_makes(convnet, batch) -> None:
    once = copy.deepcopy(convnet)
    once(batch.inputs)
    Sabr(Linf(0.1), steps=2, restarts=2)(convnet, batch, END)
    assert torch.equal(convnet[1].running_mean, once[1].running_mean)
    assert int(convnet[1].num_batches_tracked) == int(once[1].num_batches_tracked)


def test_the_attack_sees_the_network_of_the_clean_pass(convnet, batch) -> None:
    """Not its running statistics, which are made useless here."""
    attack = Sabr(Linf(0.1), steps=3)
    expected = attack.perturb(convnet, batch, END)
    convnet[1].running_mean += 100.0
    assert torch.equal(attack.perturb(convnet, batch, END), expected)
    convnet[1].eval()
    assert not torch.equal(attack.perturb(convnet, batch, END), expected)


@pytest.mark.parametrize("shift", [-0.1, 0.0, 0.4])
def test_the_regularizer_is_the_written_one(shift, rectified, exact_batch) -> None:
    """Unit by unit, from intervals computed by hand, with units mostly off, even, or mostly on; its weight falls."""
    rectified[0].bias.data += shift
    rectified[2].bias.data += shift
    lower, upper = ball(exact_batch, 0.05)
    ends = by_hand(rectified, lower, upper)
    first, total = float(((upper - lower) / 2).mean()), 0.0
    for low, high in (ends[1], ends[3], ends[6]):
        low, high = low.detach().flatten().tolist(), high.detach().flatten().tolist()
        centres = [(a + b) / 2 for a, b in zip(low, high, strict=True)]
        width = sum((b - a) / 2 for a, b in zip(low, high, strict=True)) / len(low)
        total += max(0.0, 0.5 - first / width) / 0.5
        mean = sum(centres) / len(centres)
        active = [c for c, a in zip(centres, low, strict=True) if a > 0]
        inactive = [c for c, b in zip(centres, high, strict=True) if b < 0]
        if active and inactive:
            sums = sum(active) / -sum(inactive)
            squares = sum((c - mean) ** 2 for c in active) / sum((c - mean) ** 2 for c in inactive)
            total += sum(max(0.0, 0.5 - min(q, 1 / q)) / 0.5 for q in (sums, squares))
    expected = total / 3
    assert expected > 0.1
    settings = {"train_eps": 0.1, "ramp": (0.0, 1.0)}
    middle = Progress(step=5, steps=10, epoch=0.0, seed=0)
    plain = Ibp(Linf(0.1), **settings)(rectified, exact_batch, middle)
    found = Ibp(Linf(0.1), regularizer=0.8, **settings)(rectified, exact_batch, middle)
    assert float(found.log["regularizer"]) == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(found.per_example, plain.per_example + 0.8 * 0.5 * expected)


def test_the_regularizer_leaves_out_layers_that_are_all_of_one_sign_and_its_gradient_stays_finite() -> None:
    low, high = torch.tensor([[0.5, 2.0]], requires_grad=True), torch.tensor([[1.0, 3.0]])
    first = Interval(torch.zeros(1, 2), torch.full((1, 2), 0.2))
    penalty = warm_up_penalty(first, [Interval(low, high)])
    assert float(penalty.detach()) == pytest.approx((0.5 - 0.1 / 0.375) / 0.5)
    penalty.backward()
    assert low.grad is not None
    assert low.grad.isfinite().all()


def test_the_regularizer_ends_with_the_ramp_and_acts_before_the_radius_does(rectified, exact_batch) -> None:
    objective = Ibp(Linf(0.1), regularizer=0.5, ramp=(0.2, 0.8))
    assert "regularizer" in objective(rectified, exact_batch, START).log
    assert "regularizer" not in objective(rectified, exact_batch, END).log


def test_interval_weights_keep_intervals_from_exploding_where_the_default_does_not() -> None:
    """The promise of the first weights of Shi et al.: the network's intervals do not widen layer by layer."""
    widths = {}
    for weights in ("ibp", "default"):
        model = cnn7((1, 12, 12), 10, width=16, hidden=64, generator=torch.Generator().manual_seed(0)).eval()
        if weights == "default":
            for module in model.modules():
                if isinstance(module, (nn.Conv2d, nn.Linear)):
                    module.reset_parameters()
        x = torch.rand(2, 1, 12, 12)
        network = network_of(model, (1, 12, 12))
        from trivet.objectives.certified import clipped_box

        intervals = network.intervals(clipped_box(x, 0.01))
        widths[weights] = float(intervals[network.activations[-1][1]].radius.detach().mean())
    assert widths["ibp"] < 0.02
    assert widths["default"] > 5 * widths["ibp"]


def test_a_network_is_read_again_when_its_layers_change_but_not_its_weights(mlp) -> None:
    first = network_of(mlp, (2, 4, 4))
    mlp[1].weight.data += 1
    assert network_of(mlp, (2, 4, 4)) is first
    x = torch.rand(2, 2, 4, 4)
    torch.testing.assert_close(first(x), mlp(x))
    mlp[2] = nn.ReLU()
    torch.testing.assert_close(network_of(mlp, (2, 4, 4))(x), mlp(x))
    mlp.double()
    assert network_of(mlp, (2, 4, 4)).dtype == torch.float64


@pytest.mark.parametrize(
    "wrong",
    [
        {"threat": L2(0.5)},
        {"train_eps": 1.5},
        {"ramp": (0.5, 0.2)},
        {"ramp_shape": "cubic"},
        {"kappa_end": -0.1},
        {"regularizer": -1.0},
    ],
)
def test_wrong_common_settings_are_refused_by_name(wrong) -> None:
    with pytest.raises(BadValue, match=next(iter(wrong))):
        Ibp(**{"threat": Linf(0.1), **wrong})


def test_bounds_are_computed_in_full_precision_under_autocast(mlp, batch) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = Ibp(Linf(0.05), kappa_end=0.0)(mlp, batch, END).log["robust"]
    exact = Ibp(Linf(0.05), kappa_end=0.0)(mlp, Batch(batch.inputs, batch.labels, batch.index), END).log["robust"]
    torch.testing.assert_close(found, exact)
