"""SingleProp: where it is interval arithmetic exactly, where it is not, and that it is no bound."""

from __future__ import annotations

import pytest
import torch
from interval_rules import ball, by_hand
from torch import nn

from trivet.certify.bounds.network import Box, Network, margin_rows
from trivet.data.dataset import Batch, Dataset
from trivet.errors import BadValue
from trivet.objectives.objective import Progress
from trivet.objectives.plain import Plain
from trivet.objectives.single_prop import SingleProp, error_after_relu, propagate
from trivet.threats.linf import Linf

VARIANTS = ["zero", "fastlin", "crown"]
END = Progress(step=9, steps=10, epoch=9.0, seed=7)


def radius(net: nn.Sequential, x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Centre and radius of the outputs by interval arithmetic, over the ball that is not clipped to [0, 1]."""
    lower, upper = by_hand(net, x - eps, x + eps)[-1]
    return (lower + upper) / 2, (upper - lower) / 2


def of(net: nn.Module, x: torch.Tensor, eps: float, variant: str) -> tuple[torch.Tensor, torch.Tensor]:
    return propagate(Network.of(net, x.shape[1:]), x, eps, variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_linear_network_gives_centre_and_radius_exactly(variant, exact_batch) -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 7), nn.Linear(7, 4)).double()
    z, v = of(net, exact_batch.inputs, 0.3, variant)
    centre, width = radius(net, exact_batch.inputs, 0.3)
    torch.testing.assert_close(z, centre)
    torch.testing.assert_close(v, width)


def test_one_hidden_layer_gives_the_radius_exactly_and_another_centre(exact_batch) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(32, 20), nn.ReLU(), nn.Linear(20, 4)).double()
    z, v = of(net, exact_batch.inputs, 0.3, "zero")
    centre, width = radius(net, exact_batch.inputs, 0.3)
    torch.testing.assert_close(v, width)
    assert (z - centre).abs().max() > 0.01


@pytest.mark.parametrize("variant", VARIANTS)
def test_where_every_unit_is_stable_it_is_interval_arithmetic(variant, rectified, exact_batch) -> None:
    """Biases of +100 and -100 decide which units work."""
    for layer in (rectified[0], rectified[2], rectified[5]):
        layer.bias.data = (
            100.0 * torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, 1.0, -1.0, 1.0, 1.0])[: len(layer.bias)].double()
        )
        layer.weight.data *= 0.1
    z, v = of(rectified, exact_batch.inputs, 0.2, variant)
    centre, width = radius(rectified, exact_batch.inputs, 0.2)
    torch.testing.assert_close(z, centre)
    torch.testing.assert_close(v, width)


def test_in_a_small_ball_the_radius_tends_to_that_of_intervals(rectified, exact_batch) -> None:
    gaps = []
    for eps in (1e-1, 1e-6):
        _, v = of(rectified, exact_batch.inputs, eps, "zero")
        gaps.append(float((v / radius(rectified, exact_batch.inputs, eps)[1] - 1).detach().abs().max()))
    assert gaps[0] > 1e-2
    assert gaps[1] < 1e-9


def test_the_three_errors_after_a_relu_are_half_the_width_between_its_two_lines() -> None:
    """(u - alpha l) / 2 over [l, u] = [z - v, z + v], for the slope alpha of the lower line; with fastlin's 1e-4."""
    z, v = torch.linspace(-1, 1, 41).double()[:, None], torch.tensor([0.02, 0.3, 1.5]).double()
    lower, upper = z - v, z + v
    for variant, slope in {"zero": 0.0, "fastlin": upper / (upper - lower), "crown": (z >= 0).double()}.items():
        expected = torch.where(
            lower >= 0, v.expand_as(lower), torch.where(upper <= 0, 0.0, (upper - slope * lower) / 2)
        )
        found = error_after_relu(z, v.expand_as(lower), variant)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-4 if variant == "fastlin" else 1e-12)
    zero, fastlin, crown = (error_after_relu(z, v.expand_as(lower), each) for each in VARIANTS)
    assert (zero <= fastlin + 1e-12).all()
    assert (zero <= crown + 1e-12).all()
    assert (zero < fastlin - 1e-3).any()
    assert (zero < crown - 1e-3).any()


def test_fastlin_has_its_published_denominator() -> None:
    z, v = torch.tensor([0.5]).double(), torch.tensor([1.0]).double()
    assert float(error_after_relu(z, v, "fastlin")) == pytest.approx(0.75 + 0.25 - 0.25 / 4.0001, abs=1e-12)


def test_its_margin_is_no_bound_the_counterexample() -> None:
    """relu(x - 0.5) beside the constant 0.3, x = 0, eps = 1: sure of class 0, which is wrong at x = 1."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2)).double()
    net[1].weight.data, net[1].bias.data = torch.ones(1, 1).double(), torch.tensor([-0.5]).double()
    net[3].weight.data, net[3].bias.data = torch.tensor([[0.0], [1.0]]).double(), torch.tensor([0.3, 0.0]).double()
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    z, v = of(net, x, 1.0, "zero")
    assert float((z - v).detach()[0, 0]) == pytest.approx(0.3)
    assert float((z + v).detach()[0, 1]) == pytest.approx(0.25)
    assert int(net(x + 1.0).argmax(1)) == 1
    sound = Network.of(net, (1, 1, 1)).margins(Box(x - 1, x + 1), margin_rows(torch.tensor([0]), 2), method="ibp")
    assert float(sound.detach()) <= 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_is_the_written_one(variant, rectified, exact_batch) -> None:
    objective = SingleProp(Linf(0.1), variant=variant, kappa_end=0.3)
    found = objective(rectified, exact_batch, END).per_example.detach()
    z, v = of(rectified, exact_batch.inputs, 0.1, variant)
    for number, y in enumerate(exact_batch.labels.tolist()):
        worst = torch.where(torch.arange(4) == y, z[number] - v[number], z[number] + v[number])
        expected = 0.3 * -z[number].log_softmax(0)[y] + 0.7 * -worst.log_softmax(0)[y]
        assert float(found[number]) == pytest.approx(float(expected.detach()), rel=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_a_radius_loss_and_gradient_are_those_of_plain_training(
    variant, rectified, exact_batch, gradients
) -> None:
    """Also by the formula, at the radius 0 that the shortcut leaves out."""
    plain = Plain()(rectified, exact_batch, END).per_example
    expected = gradients(rectified, plain)
    z, v = of(rectified, exact_batch.inputs, 0.0, variant)
    assert not v.any()
    robust = nn.functional.cross_entropy(z + v, exact_batch.labels, reduction="none")
    for ours in (SingleProp(Linf(0.0), variant=variant)(rectified, exact_batch, END).per_example, robust):
        torch.testing.assert_close(ours, plain)
        for one, other in zip(gradients(rectified, ours), expected, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gradient_passes_through_both_propagations(variant, rectified, exact_batch) -> None:
    objective, weight = SingleProp(Linf(0.1), variant=variant), rectified[2].weight

    def loss() -> torch.Tensor:
        return objective(rectified, exact_batch, END).per_example.mean()

    (gradient,) = torch.autograd.grad(loss(), weight)
    values = []
    for step in (1e-6, -2e-6):
        weight.data[1, 2, 0, 1] += step
        values.append(loss().item())
    assert float(gradient[1, 2, 0, 1]) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)


def test_max_pooling_takes_half_the_difference_of_its_ends_and_a_skip_adds_radii() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(1, 2, 1).double(), nn.Linear(2, 2).double()
            self.pool = nn.MaxPool2d(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inner = self.first(x)
            return self.last(self.pool(inner + inner).flatten(1))

    net, x = Net(), torch.rand(3, 1, 2, 2, dtype=torch.float64)
    _, v = of(net, x, 0.2, "zero")
    pooled = net.pool
    inner, width = 2 * net.first(x), 2 * 0.2 * net.first.weight.abs().view(1, 2, 1, 1).expand(3, 2, 2, 2)
    expected = ((pooled(inner + width) - pooled(inner - width)) / 2).flatten(1) @ net.last.weight.abs().T
    torch.testing.assert_close(v, expected)


def test_input_normalisation_divides_the_radius(exact_batch) -> None:
    from trivet.models.normalize import Normalize

    net = nn.Sequential(Normalize([0.5, 0.2], [0.25, 2.0]), nn.Flatten()).double()
    net.append(nn.Linear(32, 32).double())
    net[2].weight.data, net[2].bias.data = torch.eye(32).double(), torch.zeros(32).double()
    _, v = of(net, exact_batch.inputs, 0.1, "zero")
    torch.testing.assert_close(v[:, :16], torch.full((8, 16), 0.4).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(v[:, 16:], torch.full((8, 16), 0.05).double(), rtol=1e-6, atol=0)


def test_the_schedule_is_the_published_one() -> None:
    """eps_t 0 until step 2,000, 0.3 from step 12,000 of 55,000; K_t from 1 to 0.5 along with it."""
    objective = SingleProp(Linf(0.3))
    moments = [Progress(step, 55_000, step / 550, 0) for step in (0, 2_000, 4_500, 7_000, 12_000, 54_999)]
    assert [0.3 * objective.grown(each) for each in moments] == pytest.approx([0, 0, 0.075, 0.15, 0.3, 0.3], abs=1e-9)
    assert [objective.kappa(each) for each in moments] == pytest.approx([1, 1, 0.875, 0.75, 0.5, 0.5], abs=1e-9)


def held(batch: Batch) -> Dataset:
    return Dataset(batch.inputs, batch.labels, tuple("abcd"), "held", scale=1.0)


def test_the_adaptive_weight_makes_the_robust_term_gamma_times_the_clean_one(mlp, batch) -> None:
    objective = SingleProp(Linf(0.05), weight="adaptive", gamma=10.0)
    assert objective.needs_holdout
    first = Progress(step=9, steps=10, epoch=0.5, seed=0)
    assert objective.kappa(first) == 1.0
    found = objective.judge(mlp.eval(), held(batch), END)
    after = objective(mlp, batch, END)
    kappa = objective.kappa(END)
    assert 0 < kappa < 1
    assert found["kappa"] == kappa
    robust, natural = after.log["robust"].sum(), after.log["natural"].sum()
    assert float((1 - kappa) * robust) == pytest.approx(float(10.0 * kappa * natural), rel=1e-5)
    again = SingleProp(Linf(0.05), weight="adaptive")
    again.load_state(objective.state())
    assert again.kappa(END) == kappa
    again.load_state({})
    assert again.kappa(END) == 1.0


def test_without_a_radius_the_adaptive_weight_is_one_in_eleven(mlp, batch) -> None:
    objective = SingleProp(Linf(0.1), weight="adaptive")
    found = objective.judge(mlp.eval(), held(batch), Progress(step=0, steps=10, epoch=0.0, seed=0))
    assert found["kappa"] == pytest.approx(1 / 11)


def test_its_judge_counts_what_interval_bounds_certify_without_clipping_rules_of_its_own(
    rectified, exact_batch
) -> None:
    from interval_rules import merged_margins

    rectified.float()
    batch = Batch(exact_batch.inputs.float(), exact_batch.labels, exact_batch.index)
    for eps in (0.0, 0.02, 0.1):
        expected = (merged_margins(rectified, *ball(batch, eps), batch.labels) > 0).all(1).float().mean()
        assert SingleProp(Linf(eps)).judge(rectified, held(batch), END)["held_ibp"] == float(expected)


@pytest.mark.parametrize(
    "wrong",
    [
        {"variant": "ibp"},
        {"weight": "none"},
        {"gamma": 0.0},
        {"kappa_end": 1.5},
        {"ramp": (0.5, 0.2)},
        {"train_eps": -1.0},
    ],
)
def test_wrong_settings_are_refused_by_name(wrong) -> None:
    with pytest.raises(BadValue, match=next(iter(wrong))):
        SingleProp(Linf(0.1), **wrong)


def test_batch_norm_scales_the_radius_by_its_statistics_of_the_clean_batch(convnet, exact_batch) -> None:
    """|gamma| / sqrt(var + eps), with the variance of what the layer got; the clean loss is that of plain training."""
    net = convnet.double()
    net[1].weight.data = torch.tensor([1.5, -0.5, 1.0, 2.0, -1.0, 0.3]).double()
    values = net[0](exact_batch.inputs)
    scale = net[1].weight.abs() / (values.var((0, 2, 3), correction=0) + net[1].eps).sqrt()
    ones = torch.full_like(exact_batch.inputs, 0.05)
    before = nn.functional.conv2d(ones, net[0].weight.abs(), padding=1) * scale.view(-1, 1, 1)
    middle = nn.functional.batch_norm(values, None, None, net[1].weight, net[1].bias, training=True)
    after = error_after_relu(middle, before, "zero").flatten(1) @ net[4].weight.abs().T
    z = net[4](middle.relu().flatten(1))
    own = nn.functional.one_hot(exact_batch.labels, 4)
    worst = nn.functional.cross_entropy(z + after * (1 - 2 * own), exact_batch.labels, reduction="none")
    found = SingleProp(Linf(0.05), kappa_end=0.0)(net, exact_batch, END)
    torch.testing.assert_close(found.per_example, worst)
    torch.testing.assert_close(
        found.log["natural"], nn.functional.cross_entropy(z, exact_batch.labels, reduction="none").detach()
    )
