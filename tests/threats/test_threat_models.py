"""Perturbation sets: what they return lies in them to the last bit, and is the nearest point where promised."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trivet.errors import BadValue
from trivet.methods import build
from trivet.threats.l1 import L1, project_l1_box
from trivet.threats.l2 import L2
from trivet.threats.linf import Linf
from trivet.threats.threat import ThreatModel

KINDS = (Linf, L2, L1)
P = {"Linf": torch.inf, "L2": 2.0, "L1": 1.0}


@st.composite
def situations(draw: st.DrawFn) -> tuple[Tensor, Tensor, float]:
    """Inputs [B, 1, h, w] in [0, 1], some with every pixel at the box, anything to project, and a radius in [0, 1]."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (draw(st.integers(1, 3)), 1, draw(st.integers(1, 6)), draw(st.integers(1, 6)))
    x = torch.rand(shape, generator=generator, dtype=draw(st.sampled_from([torch.float32, torch.float64])))
    if draw(st.booleans()):
        x = x.round()
    spread = 10 ** draw(st.floats(-8, 2))
    eps = draw(st.one_of(st.floats(0, 1), st.floats(0, 1e-6), st.sampled_from([0.0, 0.1, 8 / 255, 1.0])))
    return x, x + spread * torch.randn(x.shape, generator=generator, dtype=x.dtype), eps


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=60)
@given(situation=situations())
def test_projections_lie_in_the_set_and_stay_where_they_are(
    kind: type[ThreatModel], situation: tuple[Tensor, Tensor, float]
) -> None:
    x, anything, eps = situation
    threat = kind(eps)
    point = threat.project(anything, x)
    assert bool(threat.contains(point, x).all())
    assert torch.equal(threat.project(point, x), point)
    assert bool(threat.contains(x, x).all())


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=30)
@given(situation=situations())
def test_random_starts_lie_in_the_set(kind: type[ThreatModel], situation: tuple[Tensor, Tensor, float]) -> None:
    x, _, eps = situation
    assert bool(kind(eps).contains(kind(eps).random_start(x), x).all())


def test_contains_sees_the_ulp_by_which_a_naive_clamp_overshoots() -> None:
    x = torch.rand(100, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.2
    eps = 8 / 255
    for threat, naive in (
        (Linf(eps), x + torch.tensor(eps)),
        (L2(eps * 8), x + torch.tensor(eps)),
        (L1(64 * eps), x + eps),
    ):
        assert not bool(threat.contains(naive, x).all())
        assert bool(threat.contains(threat.project(naive, x), x).all())


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.5), L1(2.0)])
def test_contains_refuses_points_outside_the_box_or_not_finite(threat: ThreatModel) -> None:
    x = torch.zeros(3, 1, 4, 4)
    points = x.clone()
    points[0, 0, 0, 0], points[1, 0, 0, 0] = -1e-7, torch.nan
    assert threat.contains(points, x).tolist() == [False, False, True]


@settings(deadline=None, max_examples=60)
@given(situation=situations())
def test_the_l1_projection_solves_the_equation_that_bisection_solves(situation: tuple[Tensor, Tensor, float]) -> None:
    x, anything, eps = (each.flatten(1).double() if isinstance(each, Tensor) else 3 * each for each in situation)
    delta = anything - x
    room = torch.where(delta > 0, 1 - x, x)

    def shrunk(shift: Tensor) -> Tensor:
        return torch.minimum((delta.abs() - shift).clamp(min=0), room)

    low, high = torch.zeros(len(x), 1, dtype=torch.float64), delta.abs().amax(1, keepdim=True)
    for _ in range(200):
        middle = (low + high) / 2
        outside = shrunk(middle).sum(1, keepdim=True) > eps
        low, high = torch.where(outside, middle, low), torch.where(outside, high, middle)
    fits = shrunk(torch.zeros_like(low)).sum(1, keepdim=True) <= eps
    expected = delta.sign() * torch.where(fits, shrunk(torch.zeros_like(low)), shrunk(high))
    scale = float(delta.abs().max()) + 1
    torch.testing.assert_close(project_l1_box(delta, x, eps), expected, atol=1e-12 * scale, rtol=0)


@pytest.mark.parametrize("threat", [Linf(0.2), L1(0.7)])
def test_projections_are_nearer_than_any_other_point_of_the_set(threat: ThreatModel) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, 1, 2, 3, generator=generator, dtype=torch.float64)
    for _ in range(20):
        anything = x + torch.randn(x.shape, generator=generator, dtype=torch.float64)
        point = threat.project(anything, x)
        rivals = x + 0.5 * torch.randn(3000, *x.shape[1:], generator=generator, dtype=torch.float64)
        rivals = threat.project(rivals, x.expand_as(rivals))
        rivals = torch.cat((rivals, point + 0.5 * (rivals - point)))  # the set is convex
        nearest = (rivals - anything).flatten(1).norm(dim=1).min()
        assert float((point - anything).norm()) <= float(nearest) + 1e-6


def test_the_l2_projection_is_radial_where_the_box_is_far() -> None:
    x = torch.full((4, 1, 3, 3), 0.5)
    direction = torch.randn(4, 1, 3, 3)
    point = L2(0.3).project(x + direction, x)
    expected = x + 0.3 * direction / direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(point, expected, atol=1e-6, rtol=0)


def test_the_published_l1_projection_error_is_not_made_here() -> None:
    x = torch.zeros(1, 5)
    x_adv = torch.tensor([[0.9, 0.6, 0.3, 0.15, 0.03]])
    assert L1(0.6).project(x_adv, x).sum().item() == pytest.approx(0.6, abs=1e-7)
    assert L1(1.4).project(torch.full((1, 3), 0.5), torch.zeros(1, 3)).sum().item() == pytest.approx(1.4, abs=1e-6)


def test_clipping_after_the_l1_ball_would_waste_the_budget_that_the_exact_projection_uses() -> None:
    x, x_adv = torch.full((1, 4), 0.9), torch.full((1, 4), 0.9) + torch.tensor([[2.0, 0.3, -0.3, 0.2]])
    exact = L1(0.3).project(x_adv, x)
    ball_only = torch.tensor([[0.3, 0.0, 0.0, 0.0]])  # the l_1 projection of (2, .3, -.3, .2)
    clipped = (x + ball_only).clamp(0, 1)
    assert float((exact - x_adv).norm()) < float((clipped - x_adv).norm()) - 1e-3
    assert float((exact - x).abs().sum()) == pytest.approx(0.3, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_radius_of_zero_leaves_only_the_input(kind: type[ThreatModel]) -> None:
    x = torch.rand(3, 1, 4, 4)
    assert torch.equal(kind(0.0).project(torch.rand(3, 1, 4, 4), x), x)
    assert torch.equal(kind(0.0).random_start(x), x)


@pytest.mark.parametrize("kind", KINDS)
def test_a_zero_gradient_moves_nothing_and_makes_no_nan(kind: type[ThreatModel]) -> None:
    x = torch.rand(2, 1, 4, 4)
    assert torch.equal(kind(0.5).ascend(x, torch.zeros_like(x), 0.1), x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_a_step_has_the_length_asked_for_however_small_or_large_the_gradient(
    kind: type[ThreatModel], scale: float
) -> None:
    x, gradient = torch.full((3, 1, 4, 4), 0.5), torch.randn(3, 1, 4, 4)
    threat = kind(0.5)
    step = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1, 1)
    moved = (threat.ascend(x, scale * gradient, step) - x).flatten(1)
    torch.testing.assert_close(torch.linalg.vector_norm(moved, ord=P[threat.norm], dim=1), step.flatten())
    assert bool(((moved * gradient.flatten(1)).sum(1) > 0).all())


def test_l1_steps_move_the_share_of_pixels_above_the_quantile() -> None:
    gradient = torch.randn(5, 1, 10, 10)
    x = torch.full_like(gradient, 0.5)
    for quantile, pixels in ((0.99, 1), (0.9, 10), (1.0, 1), (0.0, 100)):
        moved = L1(1.0, quantile=quantile).ascend(x, gradient, 1.0) != x
        assert moved.flatten(1).sum(1).tolist() == [pixels] * 5
        largest = gradient.flatten(1).abs().argmax(1)
        assert bool(moved.flatten(1).gather(1, largest[:, None]).all())


def test_l1_steps_pass_over_pixels_that_the_box_holds_back() -> None:
    x = torch.tensor([[1.0, 0.0, 0.5]])
    gradient = torch.tensor([[9.0, -8.0, 1.0]])
    moved = L1(1.0).ascend(x, gradient, 0.25)
    torch.testing.assert_close(moved, torch.tensor([[1.0, 0.0, 0.75]]))


@pytest.mark.parametrize("kind", KINDS)
def test_random_starts_come_from_the_generator_given(kind: type[ThreatModel]) -> None:
    x = torch.rand(2, 1, 4, 4)
    state = torch.get_rng_state()
    first, again = (kind(0.3).random_start(x, torch.Generator().manual_seed(5)) for _ in range(2))
    other = kind(0.3).random_start(x, torch.Generator().manual_seed(6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_random_starts_fill_the_ball_as_the_field_does() -> None:
    x = torch.full((500, 1, 8, 8), 0.5)
    generator = torch.Generator().manual_seed(0)
    cube = (Linf(0.1).random_start(x, generator) - x).abs().flatten(1)
    assert 0.045 < float(cube.mean()) < 0.055
    sphere = (L2(0.1).random_start(x, generator) - x).flatten(1).norm(dim=1)
    torch.testing.assert_close(sphere, torch.full((500,), 0.1), atol=1e-5, rtol=0)
    diamond = (L1(0.5).random_start(x, generator) - x).flatten(1)
    torch.testing.assert_close(diamond.abs().sum(1), torch.full((500,), 0.5), atol=1e-5, rtol=0)
    assert float((diamond != 0).float().mean()) < 0.5


@pytest.mark.parametrize(
    ("name", "eps"), [("linf", -0.1), ("linf", 1.5), ("l2", -1.0), ("l2", float("nan")), ("l1", -1.0)]
)
def test_radii_that_mean_nothing_are_refused(name: str, eps: float) -> None:
    with pytest.raises(BadValue, match="eps"):
        build("threats", {"name": name, "eps": eps})


def test_scaling_changes_the_radius_and_nothing_else() -> None:
    assert L1(2.0, quantile=0.8).scaled(0.5) == L1(1.0, quantile=0.8)
