"""The least change onto a hyperplane inside the box, against linear programming and bisection."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import Tensor

from trivet.threats.hyperplane import Norm, to_hyperplane

P = {"Linf": torch.inf, "L2": 2.0, "L1": 1.0}
norms = pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])


@st.composite
def planes(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Points [B, D] in the box, normals with some zeros, and gaps of which some are out of the box's reach."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows, pixels = draw(st.integers(1, 4)), draw(st.integers(1, 30))
    x = torch.rand(rows, pixels, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        x = x.round()
    w = torch.randn(rows, pixels, generator=generator, dtype=torch.float64)
    w = w * (torch.rand(rows, pixels, generator=generator) > 0.3)
    share = draw(st.floats(-1.5, 1.5))
    return x, w, share * w.abs().sum(1) * torch.rand(rows, generator=generator, dtype=torch.float64)


def _reach(x: Tensor, w: Tensor, gap: Tensor) -> Tensor:
    """How far w . d can go towards -gap inside the box."""
    toward = -gap.sign()[:, None] * w
    return torch.where(toward > 0, toward * (1 - x), -toward * x).sum(1)


@norms
@settings(deadline=None, max_examples=60)
@given(plane=planes())
def test_the_change_meets_the_plane_or_goes_as_near_as_the_box_allows(
    norm: Norm, plane: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, w, gap = plane
    d = to_hyperplane(x, w, gap, norm)
    assert bool(((x + d >= -1e-12) & (x + d <= 1 + 1e-12)).all())
    assert bool((d[w == 0] == 0).all())
    goal = torch.minimum(gap.abs(), _reach(x, w, gap))
    torch.testing.assert_close((w * d).sum(1), -gap.sign() * goal, atol=1e-5, rtol=1e-5)


@norms
@settings(deadline=None, max_examples=25)
@given(plane=planes())
def test_no_shorter_change_meets_the_plane(norm: Norm, plane: tuple[Tensor, Tensor, Tensor]) -> None:
    x, w, gap = plane
    length = torch.linalg.vector_norm(to_hyperplane(x, w, gap, norm), ord=P[norm], dim=1)
    for row in range(len(x)):
        if 1e-4 < float(gap[row].abs()) < 0.999 * float(_reach(x, w, gap)[row]):
            assert float(length[row]) == pytest.approx(
                _least(x[row], w[row], float(gap[row]), norm), rel=1e-4, abs=1e-7
            )


def _least(x: Tensor, w: Tensor, gap: float, norm: Norm) -> float:
    """The least norm by linear programming (l_inf, l_1), or by bisection on the multiplier (l_2)."""
    pixels = len(x)
    if norm == "L2":
        toward, low, high = -gap * w, 0.0, 1e12
        for _ in range(300):
            middle = (low + high) / 2
            d = (middle * toward).clamp(-x, 1 - x)
            low, high = (middle, high) if abs(float(w @ d)) < abs(gap) else (low, middle)
        return float(((high * toward).clamp(-x, 1 - x)).norm())
    bounds = [(-float(v), 1 - float(v)) for v in x]
    plane = [*w.tolist(), *[0.0] * (1 if norm == "Linf" else pixels)]
    eye = torch.eye(pixels, dtype=torch.float64)
    size = torch.ones(pixels, 1, dtype=torch.float64) if norm == "Linf" else eye
    above = torch.cat((torch.cat((eye, -size), 1), torch.cat((-eye, -size), 1)))  # |d| <= the sizes
    solved = linprog(
        [*[0.0] * pixels, *[1.0] * size.shape[1]],
        A_ub=above.numpy(),
        b_ub=[0.0] * (2 * pixels),
        A_eq=[plane],
        b_eq=[-gap],
        bounds=[*bounds, *[(0, None)] * size.shape[1]],
    )
    return float(solved.fun)


@norms
def test_a_flat_function_moves_nothing(norm: Norm) -> None:
    x = torch.rand(2, 5)
    for gap in (torch.zeros(2), torch.ones(2)):
        assert torch.equal(to_hyperplane(x, torch.zeros(2, 5), gap, norm), torch.zeros(2, 5))
