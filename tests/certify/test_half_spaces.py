"""The nearest point of a polyhedron against a general solver, and its proof against points that lie inside."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from trivet.certify.half_spaces import smallest_move


def polyhedron(seed: int, half_spaces: int = 6, size: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """One that is not empty: every half-space holds a common random point."""
    draw = np.random.default_rng(seed)
    slopes = draw.normal(size=(half_spaces, size)) * draw.uniform(0.01, 100, size=(half_spaces, 1))
    inside = draw.normal(size=size)
    return slopes, slopes @ inside + draw.exponential(0.1, half_spaces) * np.linalg.norm(slopes, axis=1)


@pytest.mark.parametrize("seed", range(20))
def test_the_move_is_the_one_a_general_solver_finds(seed: int) -> None:
    slopes, room = polyhedron(seed)
    found = smallest_move(slopes, room, 0.0, 0.0, np.inf)
    units = np.linalg.norm(slopes, axis=1)
    peer = minimize(
        lambda v: v @ v,
        np.zeros(3),
        jac=lambda v: 2 * v,
        constraints={
            "type": "ineq",
            "fun": lambda v: (room - slopes @ v) / units,
            "jac": lambda _: -slopes / units[:, None],
        },
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert peer.success
    assert found.solved
    np.testing.assert_allclose(found.move, peer.x, atol=1e-6)
    assert found.distance == pytest.approx(float(np.linalg.norm(peer.x)), abs=1e-6)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 5))
def test_the_proof_meets_the_move_which_lies_inside(seed: int, half_spaces: int, size: int) -> None:
    slopes, room = polyhedron(seed, half_spaces, size)
    found = smallest_move(slopes, room, 0.0, 0.0, np.inf)
    assert found.solved
    assert (slopes @ found.move <= room + 1e-9 * np.linalg.norm(slopes, axis=1)).all()
    assert found.distance == pytest.approx(float(np.linalg.norm(found.move)), abs=1e-9)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 10**6), st.floats(0, 2))
def test_what_is_proved_holds_when_stopped_early_and_for_every_half_space_within_the_stated_errors(
    seed: int, enough: float
) -> None:
    slopes, room = polyhedron(seed)
    draw = np.random.default_rng(seed + 1)
    room_error, slope_error = 0.01, 0.02
    disturbance = draw.normal(size=slopes.shape)
    others = slopes + slope_error * disturbance / np.linalg.norm(disturbance, axis=1, keepdims=True)
    relaxed = smallest_move(others, room + room_error, 0.0, 0.0, np.inf)
    found = smallest_move(slopes, room, room_error, slope_error, enough)
    assert found.distance <= float(np.linalg.norm(relaxed.move)) + 1e-9


def test_the_origin_needs_no_move_where_it_lies_inside() -> None:
    found = smallest_move(np.eye(2), np.array([0.0, 1.0]), 0.0, 0.0, np.inf)
    assert (found.distance, found.move.tolist(), found.solved) == (0.0, [0.0, 0.0], True)


def test_rows_of_zeros_are_no_constraints() -> None:
    found = smallest_move(np.array([[0.0, 0.0], [-1.0, 0.0]]), np.array([-5.0, -2.0]), 0.0, 0.0, np.inf)
    assert found.distance == pytest.approx(2.0)
