"""The distance from the origin to an intersection of half-spaces: proved from below, attained from above."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_ROUNDS = 200
_ADDED = 4  # violated half-spaces that join the working set in a round
_TOLERANCE = 1e-12  # of the distance, by which a half-space may be missed


@dataclass(frozen=True, eq=False)
class Projection:
    """What `smallest_move` found.

    Attributes:
        distance: no shorter move lies in all half-spaces: a proof, rounded down.
        move: [D], the shortest move, up to rounding, if `solved`.
        solved: whether `move` was found; False where `distance` was enough, or the solver gave up.
    """

    distance: float
    move: Array
    solved: bool


def smallest_move(slopes: Array, room: Array, room_error: float, slope_error: float, enough: float) -> Projection:
    """min || v ||_2 subject to slopes v <= room.

    Any non-negative combination a of the half-spaces is a half-space that contains their intersection, so

        || v ||  >=  - a . room / || slopes^T a ||          for every a >= 0,

    with equality at the multipliers of the quadratic programme. The half-spaces enter a working set when they are
    violated most; each small programme is solved as non-negative least squares (Lawson & Hanson, Solving Least Squares
    Problems, 1974, chapter 23). Half-spaces left out, and multipliers that are not optimal, only lower the proof.

    Args:
        slopes: [m, D]; rows that may be zero are ignored.
        room: [m]; the origin lies in a half-space where it is not negative.
        room_error: by which each of `room` may be wrong.
        slope_error: by which each row of `slopes` may be wrong, in l_2.
        enough: stop once this distance is proved.
    """
    from scipy.optimize import nnls

    lengths = np.linalg.norm(slopes, axis=1)
    real = lengths > slope_error
    slopes, room, lengths = slopes[real], room[real], lengths[real]
    move, proved, working = np.zeros(slopes.shape[1]), 0.0, np.empty(0, np.int64)
    for _ in range(_ROUNDS):
        violation = (slopes @ move - room) / lengths
        violation[working] = -np.inf  # those inside are met as well as the solver can
        worst = np.argsort(-violation, kind="stable")[:_ADDED]
        worst = worst[violation[worst] > _TOLERANCE * (np.linalg.norm(move) + np.abs(room[worst]) / lengths[worst])]
        if not len(worst):
            return Projection(proved, move, True)
        working = np.concatenate([working, worst])
        normals, offsets = slopes[working] / lengths[working, None], room[working] / lengths[working]
        system = np.vstack([-normals.T, -offsets])
        try:
            weights, _ = nnls(system, np.eye(len(system))[-1], maxiter=50 * len(working) + 100)
        except RuntimeError:  # it cycled; what is proved so far stands
            break
        pull, gap = normals.T @ weights, 1 + float(offsets @ weights)
        if gap <= 0:
            break
        move = -pull / gap
        multipliers = weights / lengths[working]
        total = float(multipliers.sum())
        numerator = -float(multipliers @ room[working]) - total * room_error
        denominator = float(np.linalg.norm(slopes[working].T @ multipliers)) + total * slope_error
        proved = max(proved, numerator / denominator if denominator > 0 else 0.0)
        if proved >= enough:
            break
    return Projection(proved, move, False)
