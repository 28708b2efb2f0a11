"""Sensitivities against the convolution written out as a matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

from trivet.errors import BadValue
from trivet.models.normalize import Normalize
from trivet.models.sensitivity import UnitSensitivity, kernel_sensitivity, sensitivity

SHAPES = [  # kernel, stride, padding, side, input channels
    ((5, 5), (2, 2), (2, 2), 12, 1),
    ((5, 5), (1, 1), (0, 0), 11, 2),
    ((3, 3), (2, 2), (1, 1), 9, 3),
    ((4, 2), (2, 3), (3, 0), 12, 2),
    ((2, 2), (3, 3), (0, 0), 9, 2),
    ((1, 1), (1, 1), (0, 0), 4, 3),
]


def matrix(layer: nn.Module, *shape: int) -> Tensor:
    """The layer without its bias as a matrix [outputs, inputs], column by column."""
    size = torch.Size(shape).numel()
    zero = layer(torch.zeros(1, *shape, dtype=torch.float64))
    return (layer(torch.eye(size, dtype=torch.float64).view(size, *shape)) - zero).flatten(1).detach().T


def convolution(kernel: Any, stride: Any, padding: Any, channels: int, seed: int = 0) -> nn.Conv2d:
    torch.manual_seed(seed)
    return nn.Conv2d(channels, 4, kernel, stride=stride, padding=padding).double()


@pytest.mark.parametrize(("kernel", "stride", "padding", "side", "channels"), SHAPES)
@pytest.mark.parametrize("noise", ["L1", "L2"])
def test_l1_sensitivities_are_the_largest_column_norm(
    kernel: Any, stride: Any, padding: Any, side: int, channels: int, noise: Any
) -> None:
    layer = convolution(kernel, stride, padding, channels)
    columns = matrix(layer, channels, side, side).norm(1 if noise == "L1" else 2, dim=0)
    found = kernel_sensitivity(layer.weight, layer.stride, "L1", noise)
    torch.testing.assert_close(found, columns.max())


@pytest.mark.parametrize(("kernel", "stride", "padding", "side", "channels"), SHAPES)
def test_the_l2_bound_is_never_below_the_spectral_norm(
    kernel: Any, stride: Any, padding: Any, side: int, channels: int
) -> None:
    layer = convolution(kernel, stride, padding, channels)
    true = float(torch.linalg.matrix_norm(matrix(layer, channels, side, side), 2))
    found = float(kernel_sensitivity(layer.weight.detach(), layer.stride, "L2", "L2"))
    assert true <= found * (1 + 1e-12)
    if all(k <= s for k, s in zip(kernel, stride, strict=True)):
        assert found == pytest.approx(true, rel=1e-12)  # patches do not overlap


def test_the_factor_for_overlapping_patches_is_needed() -> None:
    """A constant kernel: dividing by it would be wrong, and the bound without it falls short."""
    layer = convolution((5, 5), (2, 2), (2, 2), 1)
    nn.init.ones_(layer.weight)
    true = float(torch.linalg.matrix_norm(matrix(layer, 1, 16, 16), 2))
    without = float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2))
    assert without < 2 * without < true < float(kernel_sensitivity(layer.weight.detach(), (2, 2), "L2", "L2"))


@pytest.mark.parametrize(("attack", "noise"), [("L1", "L1"), ("L1", "L2"), ("L2", "L2")])
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000))
def test_no_pair_of_images_moves_the_layers_by_more(attack: Any, noise: Any, seed: int) -> None:
    torch.manual_seed(seed)
    scales = torch.rand(3, 1, 1) + 0.2
    before = nn.Sequential(
        Normalize([0.5, 0.3], [0.25, 0.5]),
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 3, 5, stride=2, padding=2),
    ).double()
    x, direction = torch.rand(2, 1, 2, 8, 8, dtype=torch.float64)
    # One pixel or all of them, far enough to make the bound bite.
    change = torch.zeros_like(x) if seed % 2 else direction - 0.5
    if seed % 2:
        change.view(-1)[seed % x.numel()] = 1.0
    moved = ((before(x + change) - before(x)).detach() / scales.double()).flatten()
    size = change.flatten().norm(1 if attack == "L1" else 2)
    assert float(moved.norm(1 if noise == "L1" else 2)) <= float(size) * sensitivity(before, attack, noise, scales)


def test_the_sensitivity_of_layers_is_the_product_with_the_noise_in_the_last() -> None:
    linear = nn.Linear(4, 3).double()
    layers = nn.Sequential(Normalize([0.0], [0.2]), nn.Flatten(), linear, nn.ReLU())
    scales = torch.tensor([0.5, 2.0, 1.0])
    true = 5 * torch.linalg.matrix_norm(linear.weight.detach() / scales.double()[:, None], 2)
    assert sensitivity(layers, "L2", "L2", scales) == pytest.approx(float(true), rel=1e-6)
    assert sensitivity(nn.Sequential(nn.Identity()), "L1", "L1", torch.tensor(0.25)) == pytest.approx(4)


@pytest.mark.parametrize(
    ("layer", "complaint"),
    [
        (nn.GELU(), "a GELU, whose sensitivity is not known"),
        (nn.BatchNorm2d(1), "a BatchNorm2d"),
        (nn.Conv2d(2, 2, 3, groups=2), "groups=1"),
        (nn.Conv2d(2, 2, 3, dilation=2), "dilation=1"),
        (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), "padding_mode"),
    ],
)
def test_layers_of_unknown_sensitivity_are_refused(layer: nn.Module, complaint: str) -> None:
    with pytest.raises(BadValue, match=complaint):
        sensitivity(nn.Sequential(layer), "L2", "L2")


def test_an_l2_attack_has_no_bound_in_l1() -> None:
    with pytest.raises(BadValue, match="an L2 attack moves the L1 norm"):
        kernel_sensitivity(torch.ones(1, 1, 1, 1), (1, 1), "L2", "L1")


@pytest.mark.parametrize(("attack", "noise"), [("L1", "L1"), ("L1", "L2"), ("L2", "L2")])
def test_the_parametrization_keeps_the_sensitivity_at_one_whatever_the_optimiser_does(attack: Any, noise: Any) -> None:
    normalize, layer = Normalize([0.4], [0.3]), nn.Conv2d(1, 4, 5, stride=2, padding=2)
    shares = torch.tensor([0.5, 1.0, 1.5, 1.0])
    unit = UnitSensitivity((2, 2), attack, noise, shares, sensitivity(nn.Sequential(normalize), attack, attack))
    parametrize.register_parametrization(layer, "weight", unit)
    before = nn.Sequential(normalize, layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    for _ in range(4):
        assert sensitivity(before, attack, noise, shares) == pytest.approx(1, rel=1e-5)
        optimizer.zero_grad()
        before(torch.rand(3, 1, 8, 8)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize(("attack", "noise"), [("L1", "L1"), ("L1", "L2"), ("L2", "L2")])
def test_gradients_pass_through_the_parametrization(attack: Any, noise: Any) -> None:
    torch.manual_seed(0)
    unit = UnitSensitivity((2, 1), attack, noise, torch.rand(3, dtype=torch.float64) + 0.5, 2.0)
    weight = torch.randn(3, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(unit, weight)
