"""The lazy-regime bound against the flow it bounds, integrated by matrix exponentials; and when it is void."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trivet.errors import BadValue
from trivet.models.lazy_regime import LazyBound, has_batch_norm, lazy_bound
from trivet.models.tangent_kernel import linearize, tangent_kernel

SOUND = {"drift": 0.0, "squared_loss": True, "batch_norm": False, "momentum_or_decay": False, "inputs_change": False}


def linear(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 2, bias=False)).double()


def residual_at(weight: Tensor, mask: Tensor, x: Tensor, y: Tensor, time: float) -> Tensor:
    """f - y [n, C] of a masked linear model after gradient flow: each output is its own linear system."""
    columns = []
    for c in range(len(y[0])):
        gram = (x * mask[c]) @ x.T / len(x)
        columns.append(torch.linalg.matrix_exp(-gram * time) @ (x @ (weight[c] * mask[c]) - y[:, c]))
    return torch.stack(columns, 1)


@settings(max_examples=25)
@given(seed=st.integers(0, 200))
def test_the_flow_of_a_linear_model_stays_below_it(seed: int) -> None:
    """Fewer records than weights, so that both kernels are regular and the bound is finite."""
    model = linear(seed)
    weight = model[1].weight.detach()  # type: ignore[operator]
    draw = torch.Generator().manual_seed(seed)
    x = torch.rand(3, 1, 2, 3, dtype=torch.float64, generator=draw)
    y = torch.rand(3, 2, dtype=torch.float64, generator=draw)
    mask = torch.rand(2, 6, generator=draw) < 0.8
    sparse = {"1.weight": weight * mask}
    dense_at, sparse_at = linearize(model, x), linearize(model, x, sparse)
    bound = lazy_bound(
        tangent_kernel(dense_at, dense_at),
        tangent_kernel(sparse_at, sparse_at, {"1.weight": mask}),
        dense_at.outputs,
        sparse_at.outputs,
        y,
    )
    flat, full = x.flatten(1), torch.ones_like(mask)
    for time in (0.0, 0.1, 1.0, 10.0, 100.0):
        apart = residual_at(weight, mask, flat, y, time) - residual_at(weight, full, flat, y, time)
        assert float(apart.norm()) <= bound.at(time) * (1 + 1e-9) + 1e-12
        assert bound.at(time) <= bound.ever * (1 + 1e-9) or bound.lam <= 0
    assert bound.at(0.0) == pytest.approx(float((sparse_at.outputs - dense_at.outputs).norm()))


def test_the_bound_over_all_times_is_reached_where_it_should() -> None:
    bound = LazyBound(initial=0.0, gap=2.0, residual=3.0, lam=0.5, records=4)
    assert bound.at(1 / 0.5) == pytest.approx(bound.ever)
    assert bound.ever == pytest.approx(2 * 3 / (4 * math.e * 0.5))
    assert LazyBound(0.0, 2.0, 3.0, 0.0, 4).ever == math.inf


def test_without_a_difference_nothing_comes_apart() -> None:
    one = linearize(linear(1), torch.rand(3, 1, 2, 3, dtype=torch.float64))
    kernel = tangent_kernel(one, one)
    bound = lazy_bound(kernel, kernel, one.outputs, one.outputs, torch.zeros(3, 2))
    assert bound.gap == bound.initial == bound.at(3.0) == 0


def test_it_is_void_for_every_reason_by_itself() -> None:
    good = LazyBound(0.1, 1.0, 1.0, 0.5, 4)
    assert good.void(**SOUND) == ()  # type: ignore[arg-type]
    for change, word in (
        ({"drift": 0.21}, "moves by 21%"),
        ({"drift": None}, "not known"),
        ({"squared_loss": False}, "not the squared one"),
        ({"batch_norm": True}, "BatchNorm"),
        ({"momentum_or_decay": True}, "plain gradient descent"),
        ({"inputs_change": True}, "made anew"),
    ):
        (reason,) = good.void(**(SOUND | change))  # type: ignore[arg-type]
        assert word in reason
    (reason,) = LazyBound(0.1, 1.0, 1.0, 1e-6, 4).void(**SOUND)  # type: ignore[arg-type]
    assert "singular" in reason


def test_a_mixed_kernel_is_refused() -> None:
    model = linear(2)
    here, there = (linearize(model, torch.rand(3, 1, 2, 3, dtype=torch.float64)) for _ in range(2))
    mixed = tangent_kernel(here, there)
    with pytest.raises(BadValue, match="must be symmetric"):
        lazy_bound(mixed, mixed, here.outputs, here.outputs, torch.zeros(3, 2))


def test_batch_norm_is_seen() -> None:
    assert has_batch_norm(nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)))
    assert not has_batch_norm(nn.Sequential(nn.Conv2d(1, 1, 1), nn.GroupNorm(1, 1)))
