"""Entropy on activations whose entropy is known, its slope by differences, and what retraining does to a network."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy as reference
from torch import nn
from torch.func import functional_call, grad, vmap

from trivet.data.dataset import Batch
from trivet.data.digits import digits
from trivet.errors import BadValue
from trivet.methods import find
from trivet.models.mlp import mlp as perceptron
from trivet.objectives.entropic_retraining import (
    EntropicRetraining,
    activation_layers,
    entropies,
    layer_entropy,
    towards,
)
from trivet.objectives.objective import Objective, Progress
from trivet.objectives.plain import Plain
from trivet.randomness import generator
from trivet.threats.losses import cross_entropy


@pytest.mark.parametrize("value", [1e-3, 1.0, 1e4])
def test_known_entropies(value) -> None:
    """Equal activity 1, a single active unit 0, two equal units of n log(2) / log(n), a dead layer 0."""
    a = value * torch.tensor([[1.0, 1, 1, 1, 1], [0, 0, 1, 0, 0], [0, 1, 0, 1, 0], [0, 0, 0, 0, 0]]).double()
    expected = torch.tensor([1.0, 0.0, math.log(2) / math.log(5), 0.0]).double()
    torch.testing.assert_close(layer_entropy(a), expected, rtol=0, atol=1e-4)


@given(st.lists(st.floats(1e-2, 10.0), min_size=2, max_size=9), st.floats(1e-1, 1e3), st.integers(0, 8))
def test_entropy_is_that_of_scipy_whatever_the_scale_order_and_sign(values, scale, shift) -> None:
    a = torch.tensor([values]).double()
    expected = reference(values, base=len(values))
    for each in (a, scale * a, -a, a.roll(shift, 1)):
        assert float(layer_entropy(each)) == pytest.approx(expected, abs=1e-5)


def test_channels_are_averaged_over_space() -> None:
    a = torch.rand(3, 4, 5, 2, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(layer_entropy(a), layer_entropy(a.mean((2, 3))))


def test_its_slope_is_that_of_differences_and_a_dead_layer_has_none() -> None:
    a = torch.rand(2, 6, generator=torch.Generator().manual_seed(0)).double() + 0.1
    assert torch.autograd.gradcheck(layer_entropy, a.requires_grad_())
    before = torch.full((1, 3), -1.0, requires_grad=True)
    (slope,) = torch.autograd.grad(layer_entropy(before.relu()).sum(), before)
    assert torch.equal(slope, torch.zeros(1, 3))


def test_half_precision_is_widened() -> None:
    a = torch.rand(2, 6).bfloat16()
    assert torch.equal(layer_entropy(a), layer_entropy(a.float()))


def test_a_layer_of_one_unit_is_refused() -> None:
    with pytest.raises(BadValue, match="a layer of 1 unit has no entropy"):
        layer_entropy(torch.ones(3, 1))


def test_the_loss_is_the_cross_entropy_and_the_weighted_entropies_of_the_layers_named(
    rectified, exact_batch, progress
) -> None:
    x, y = exact_batch.inputs, exact_batch.labels
    first = rectified[:2](x).mean((2, 3))
    last = rectified[:7](x)
    found = EntropicRetraining({"1": 0.5, "6": -2.0})(rectified, exact_batch, progress)
    expected = cross_entropy(rectified(x), y) + 0.5 * layer_entropy(first) - 2.0 * layer_entropy(last)
    torch.testing.assert_close(found.per_example, expected)
    torch.testing.assert_close(found.log["entropy 6"], layer_entropy(last))
    torch.testing.assert_close(found.log["active 6"], (last > 0).float().mean(1))


def test_by_default_the_first_activation_function_is_pushed_down(rectified, exact_batch, progress) -> None:
    ours, named = (
        each(rectified, exact_batch, progress).per_example
        for each in (EntropicRetraining(), EntropicRetraining({"1": 0.3}))
    )
    assert torch.equal(ours, named)
    assert activation_layers(rectified) == ["1", "3", "6"]


def test_a_network_without_activation_modules_must_have_its_layers_named(batch, progress) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(32, 8), nn.Linear(8, 4))
    with pytest.raises(BadValue, match="no activation function"):
        EntropicRetraining()(net, batch, progress)
    assert "entropy 1" in EntropicRetraining({"1": 0.1})(net, batch, progress).log


def test_a_layer_that_is_not_there_is_refused_by_name(mlp, batch, progress) -> None:
    with pytest.raises(BadValue, match="relu9"):
        EntropicRetraining({"relu9": 1.0})(mlp, batch, progress)


def test_weights_must_be_finite() -> None:
    with pytest.raises(BadValue, match="weights="):
        EntropicRetraining({"relu1": math.inf})


def test_with_zero_weights_it_is_plain_retraining_bit_for_bit(convnet, batch, progress, gradients) -> None:
    found, plain = (
        gradients(convnet, each(convnet, batch, progress).per_example)
        for each in (EntropicRetraining({"2": 0.0}), Plain())
    )
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, plain, strict=True))


def test_the_taps_are_gone_afterwards(mlp, batch, progress) -> None:
    EntropicRetraining()(mlp, batch, progress)
    entropies(mlp, batch.inputs)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in mlp.modules())


def test_gradients_of_single_records_can_be_taken_by_vmap(mlp, exact_batch, progress) -> None:
    objective, net = EntropicRetraining(), mlp.double()
    values = {name: value.detach() for name, value in net.named_parameters()}

    class Losses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x, y, index):
            return objective.losses(self.net, Batch(x[None], y[None], index[None]), x[None], progress).per_example[0]

    losses = Losses()

    def of_one(values, *record):
        return functional_call(losses, {f"net.{name}": value for name, value in values.items()}, record)

    each = vmap(grad(of_one), in_dims=(None, 0, 0, 0))(
        values, exact_batch.inputs, exact_batch.labels, exact_batch.index
    )
    objective(net, exact_batch, progress).per_example.sum().backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(each[name].sum(0), parameter.grad)


def trained(objective: Objective, net: nn.Module, epochs: int, lr: float) -> nn.Module:
    data, net = digits().train, copy.deepcopy(net)
    optimizer = torch.optim.Adam(net.parameters(), lr)
    for step in range(epochs * 22):
        rows = torch.randperm(len(data), generator=generator(0, "rows", step // 22))
        batch = data.batch(rows[64 * (step % 22) :][:64])
        optimizer.zero_grad()
        objective(net, batch, Progress(step, epochs * 22, step / 22, 0)).per_example.mean().backward()
        optimizer.step()
    return net.eval()


def test_the_signs_lead_from_one_network_to_the_other() -> None:
    """The second network is made so that one unit of layer 1 is active alone, and all units of layer 2 equally."""
    net = perceptron((1, 4, 4), 3, (6, 5), generator=generator(0, "weights"))
    other = copy.deepcopy(net)
    for layer, bias in ((other.fc1, torch.eye(6)[0]), (other.fc2, torch.ones(5))):
        nn.init.zeros_(layer.weight)
        layer.bias.data.copy_(bias)
    x = torch.rand(7, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    assert entropies(other, x) == pytest.approx({"relu1": 0.0, "relu2": 1.0}, abs=1e-5)
    assert towards(net, other, x, 0.2) == {"relu1": 0.2, "relu2": -0.2}
    assert towards(other, net, x, 0.2) == {"relu1": -0.2, "relu2": 0.2}


def test_entropies_are_those_of_eval_mode_and_leave_the_mode(convnet) -> None:
    x = torch.rand(5, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    found = entropies(convnet, x)
    assert convnet.training
    convnet.eval()
    assert found == {"2": pytest.approx(float(layer_entropy(convnet[:3](x)).mean().detach()))}


def test_retraining_lowers_or_raises_the_entropy_of_layers_as_told() -> None:
    start = perceptron((1, 8, 8), 10, (64, 32), generator=generator(0, "weights"))
    natural = trained(Plain(), start, 6, 4e-3)
    weights = {"relu1": 1.0, "relu2": 1.0}
    plain, lowered, raised = (
        entropies(trained(objective, natural, 3, 4e-4), digits().test.batch(torch.arange(355)).inputs)
        for objective in (Plain(), EntropicRetraining(weights), EntropicRetraining(dict.fromkeys(weights, -1.0)))
    )
    for layer in weights:
        assert lowered[layer] < plain[layer] - 0.01
        assert raised[layer] > plain[layer] + 0.005


def test_the_register_calls_it_a_reconstruction() -> None:
    assert "reconstruction" in find("objectives", "entropic_retraining").note
