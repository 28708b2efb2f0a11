"""The grey convolution is the convolution, and its gradient is the gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trivet.models.grey_convolution import GreyConvolution
from trivet.models.surrogate import surrogate


@settings(deadline=None, max_examples=40)
@given(
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    size=st.tuples(st.integers(5, 12), st.integers(5, 12)),
    bias=st.booleans(),
)
def test_value_and_input_gradient_are_those_of_the_layer(
    kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], size: tuple[int, int], bias: bool
) -> None:
    layer = nn.Conv2d(1, 6, kernel, stride, padding, bias=bias)
    adopted = copy.deepcopy(layer)
    GreyConvolution.adopt(adopted)
    assert type(adopted) is GreyConvolution
    x = torch.randn(3, 1, *size, requires_grad=True)
    upstream = torch.randn_like(layer(x))
    (expected,) = torch.autograd.grad(layer(x), x, upstream)
    (found,) = torch.autograd.grad(adopted(x), x, upstream)
    assert torch.equal(adopted(x), layer(x))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 6, 3),
        nn.Conv2d(1, 6, 3, dilation=2),
        nn.Conv2d(1, 6, 3, padding="same"),
        nn.Conv2d(1, 6, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(1, 6, 3).to(torch.bfloat16),
        nn.Linear(1, 6),
    ],
    ids=str,
)
def test_other_layers_are_left_alone(layer: nn.Module) -> None:
    before = type(layer)
    GreyConvolution.adopt(layer)
    assert type(layer) is before


def test_stand_ins_use_it_and_the_model_does_not() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)).eval()
    stand_in = surrogate(model, "fp32")
    assert any(isinstance(module, GreyConvolution) for module in stand_in.modules())
    assert not any(isinstance(module, GreyConvolution) for module in model.modules())
