"""Integrated gradients against closed forms and another library, and the Gini index of vectors whose index is known."""

from __future__ import annotations

import importlib.util
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trivet.errors import BadValue, TrivetError
from trivet.models.attribution import class_logit, deep_shap, explain_class, gini, integrated_gradients

needs_captum = pytest.mark.skipif(importlib.util.find_spec("captum") is None, reason="captum is not installed")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3)
    ).double()


def records() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(5, 1, 4, 4, generator=generator, dtype=torch.float64), torch.arange(5) % 3


def one_layer(w: Tensor) -> nn.Sequential:
    net = nn.Sequential(nn.Flatten(), nn.Linear(w.numel(), 1, bias=False), nn.Sigmoid()).double()
    net[1].weight.data = w[None].clone()
    return net


def closed_form(w: Tensor, x: Tensor, u: Tensor) -> Tensor:
    """(3) of the paper: (F(x) - F(u)) (x - u) w / (w . (x - u)), for F = sigmoid(w . x)."""
    change = torch.sigmoid(x @ w) - torch.sigmoid(u @ w)
    return (change / ((x - u) @ w))[:, None] * (x - u) * w


def test_of_a_linear_function_they_are_weight_times_input_with_a_single_step() -> None:
    w, x, u = torch.randn(3, 7, dtype=torch.float64)
    found = integrated_gradients(lambda points: points @ w, x[None], u[None], steps=1)
    torch.testing.assert_close(found[0], (x - u) * w)


def test_of_a_quadratic_function_the_midpoint_sum_is_exact() -> None:
    """F(x) = x^T A x has IG_i = (x - u)_i (A_sym (x + u))_i: its gradient is linear, and midpoints integrate lines."""
    A, (x, u) = torch.randn(4, 4, dtype=torch.float64), torch.randn(2, 1, 4, dtype=torch.float64)
    found = integrated_gradients(lambda p: torch.einsum("bi,ij,bj->b", p, A, p), x, u, steps=3)
    torch.testing.assert_close(found, (x - u) * ((x + u) @ (A + A.T) / 2))


def test_of_one_layer_they_are_the_closed_form() -> None:
    generator = torch.Generator().manual_seed(2)
    w, x, u = torch.randn(8, generator=generator, dtype=torch.float64), *torch.rand(2, 6, 8, dtype=torch.float64)
    net = one_layer(w)
    found = integrated_gradients(lambda points: net(points)[:, 0], x, u, steps=2000)
    torch.testing.assert_close(found, closed_form(w, x, u), rtol=1e-5, atol=1e-8)


def test_attributions_add_up_to_the_change_of_the_logit() -> None:
    net, (x, y) = network(), records()
    logit = class_logit(net, y)
    change = (logit(x) - logit(torch.zeros_like(x))).detach()
    # A ReLU network's gradient jumps along the path; each jump is misplaced by at most half a step.
    assert ((explain_class(net, x, y, 500).flatten(1).sum(1) - change).abs() < 0.01 * change.abs()).all()


def test_they_can_be_trained_through() -> None:
    net, (x, y) = network(), records()
    norm = integrated_gradients(class_logit(net, y), x, torch.zeros_like(x), 5).abs().sum()
    (gradient,) = torch.autograd.grad(norm, net[5].weight)
    values = []
    for step in (1e-6, -2e-6):
        net[5].weight.data[1, 2] += step
        values.append(float(integrated_gradients(class_logit(net, y), x, torch.zeros_like(x), 5).abs().sum().detach()))
    assert float(gradient[1, 2]) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4)


def test_a_model_in_training_is_explained_as_it_will_be_used_and_left_as_it_was() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.Dropout(0.5)).double().train()
    x, y = records()
    torch.testing.assert_close(explain_class(net, x, y), x * net[1].weight.detach()[y].view_as(x))
    assert net.training
    assert net[2].training


@needs_captum
def test_they_are_those_of_another_library() -> None:
    from captum.attr import IntegratedGradients

    net, (x, y) = network(), records()
    theirs = IntegratedGradients(net).attribute(x, torch.zeros_like(x), target=y, n_steps=50, method="riemann_middle")
    # They round their midpoints to float32.
    torch.testing.assert_close(explain_class(net, x, y, 50), theirs.detach(), rtol=1e-6, atol=1e-8)


@needs_captum
def test_deep_shap_of_one_layer_is_the_closed_form_of_integrated_gradients() -> None:
    w, x = torch.randn(16, dtype=torch.float64), records()[0]
    found = deep_shap(one_layer(w), x, torch.zeros(5, dtype=torch.int64))
    torch.testing.assert_close(found.flatten(1), closed_form(w, x.flatten(1), torch.zeros_like(x.flatten(1))))


@needs_captum
def test_deep_shap_adds_up_and_leaves_the_model_and_its_warnings_alone() -> None:
    net, (x, y) = network(), records()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = deep_shap(net.train(), x, y)
    logit = class_logit(net, y)
    torch.testing.assert_close(found.flatten(1).sum(1), (logit(x) - logit(torch.zeros_like(x))).detach())
    assert net.training
    assert not any(module._forward_hooks or module._backward_hooks for module in net.modules())


@needs_captum
def test_deep_shap_refuses_a_model_that_uses_an_activation_twice() -> None:
    relu = nn.ReLU()
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), relu, nn.Linear(8, 3), relu).double()
    with pytest.raises(TrivetError, match="captum cannot take this model apart"):
        deep_shap(net, *records())


@pytest.mark.parametrize("n", [1, 2, 10, 1000])
def test_gini_of_equal_entries_is_0_and_of_a_single_one_1_minus_1_over_n(n: int) -> None:
    equal, single = torch.full((n,), -0.3), torch.zeros(n)
    single[n // 2] = -5.0
    assert gini(torch.stack([equal, single])).tolist() == pytest.approx([0.0, 1 - 1 / n], abs=1e-12)


def test_gini_of_one_to_four_and_of_nothing() -> None:
    assert gini(torch.tensor([[3.0, -1.0, 4.0, 2.0], [0.0, 0.0, 0.0, 0.0]])).tolist() == pytest.approx([0.25, 0.0])


@settings(deadline=None)
@given(st.lists(st.floats(-1e3, 1e3, allow_subnormal=False), min_size=1, max_size=12), st.floats(0.01, 100))
def test_gini_is_the_mean_absolute_difference_over_twice_the_mean_whatever_the_scale(values, factor) -> None:
    v = torch.tensor(values, dtype=torch.float64).abs()
    if float(v.sum()) < 1e-6:
        return
    expected = float((v[:, None] - v[None]).abs().mean() / (2 * v.mean()))
    other = 1 - 2 * sum(x / v.sum() * (len(v) - k + 0.5) / len(v) for k, x in enumerate(v.sort().values, 1))
    assert float(gini(v[None])) == pytest.approx(expected, abs=1e-9)
    assert float(gini(-factor * v[None])) == pytest.approx(expected, abs=1e-9)
    assert float(other) == pytest.approx(expected, abs=1e-9)


def test_no_steps_are_refused() -> None:
    with pytest.raises(BadValue, match="steps=0"):
        integrated_gradients(lambda points: points.sum(1), torch.ones(1, 2), torch.zeros(1, 2), 0)
