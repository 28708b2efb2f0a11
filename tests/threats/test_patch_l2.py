"""The patch-wise ball: membership to the last bit, and its worst case against a linear network in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trivet.errors import BadValue
from trivet.threats.l2 import L2
from trivet.threats.patch_l2 import PatchL2
from trivet.threats.pgd import PGD


@st.composite
def situations(draw: st.DrawFn) -> tuple[Tensor, Tensor, float]:
    """Inputs [B, C, H, W], anything to project, and a radius."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = tuple(draw(st.integers(1, 5)) for _ in range(4))
    x = torch.rand(shape, generator=generator, dtype=draw(st.sampled_from([torch.float32, torch.float64])))
    x = x.round() if draw(st.booleans()) else x
    spread = 10 ** draw(st.floats(-8, 2))
    eps = draw(st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1e-6, 1 / 16])))
    return x, x + spread * torch.randn(shape, generator=generator, dtype=x.dtype), eps


@settings(deadline=None, max_examples=60)
@given(situation=situations())
def test_projections_and_random_starts_lie_in_the_set_and_stay_where_they_are(situation) -> None:
    x, anything, eps = situation
    threat = PatchL2(eps)
    point = threat.project(anything, x)
    assert bool(threat.contains(point, x).all())
    assert torch.equal(threat.project(point, x), point)
    assert bool(threat.contains(threat.random_start(x), x).all())
    assert bool(threat.contains(x, x).all())


def test_each_row_is_projected_as_a_record_of_its_own_by_the_l2_ball() -> None:
    x, anything = torch.rand(2, 3, 4, 5), torch.rand(2, 3, 4, 5)
    rows = L2(0.2).project(anything.reshape(24, 1, 1, 5), x.reshape(24, 1, 1, 5))
    torch.testing.assert_close(PatchL2(0.2).project(anything, x).reshape(24, 1, 1, 5), rows)


def test_one_row_too_far_is_outside() -> None:
    x = torch.full((2, 1, 3, 4), 0.5)
    far = x.clone()
    far[1, 0, 2, 0] += 0.11
    assert PatchL2(0.1).contains(far, x).tolist() == [True, False]


def test_a_patch_without_gradient_stays_and_the_others_move_by_the_whole_step() -> None:
    gradient = torch.randn(2, 1, 3, 4)
    gradient[0, 0, 1] = 0.0
    gradient[1, 0, 2] *= 1e-30
    moved = PatchL2(0.1).ascend(torch.zeros_like(gradient), gradient, 0.05).norm(dim=-1)
    expected = torch.full((2, 1, 3), 0.05)
    expected[0, 0, 1] = 0.0
    torch.testing.assert_close(moved, expected)


def test_the_worst_margin_of_two_orthonormal_filters_on_one_patch_is_known() -> None:
    """<u_y, x> - <u_j, x> of x = alpha u_y falls by sqrt(2) eps, along (u_j - u_y) / sqrt(2)."""
    basis, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    net = nn.Sequential(nn.Flatten(), nn.Linear(6, 2)).double()
    # The box wants inputs around one half, hence the biases.
    net[1].weight.data, net[1].bias.data = basis[:2].clone(), -0.5 * basis[:2].sum(1)
    x = (0.5 + 0.3 * basis[0]).view(1, 1, 1, 6)
    point = PGD(PatchL2(0.1), steps=20, loss="margin", random_start=False).search(net, x, torch.tensor([0]))
    logits = net(point)[0].detach()
    assert float(logits[0] - logits[1]) == pytest.approx(0.3 - math.sqrt(2) * 0.1, abs=1e-9)
    torch.testing.assert_close((point - x).flatten() / 0.1, (basis[1] - basis[0]) / math.sqrt(2))


def test_a_negative_radius_is_refused() -> None:
    with pytest.raises(BadValue, match="eps=-1"):
        PatchL2(-1)
