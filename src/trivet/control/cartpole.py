"""CartPole: keep a pole upright on a cart by pushing it left or right (Barto, Sutton & Anderson 1983)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from trivet.control.environment import Environment, States
from trivet.methods import method

_GRAVITY, _POLE, _HALF_LENGTH, _FORCE, _TAU = 9.8, 0.1, 0.5, 10.0, 0.02
_TOTAL = _POLE + 1.0
_MOMENT = _POLE * _HALF_LENGTH
_FARTHEST, _STEEPEST = 2.4, 12 * 2 * math.pi / 360


@method(title="CartPole", paper="Barto, Sutton & Anderson, IEEE Trans. SMC 1983", year=1983, name="cartpole")
@dataclass(frozen=True)
class CartPole(Environment):
    """Gymnasium's CartPole, bit for bit, for many episodes at once: reward 1 for each step, at most `horizon`.

    Observed are position (m), velocity (m/s), angle (rad) and angular velocity (rad/s), rounded to float32, as they
    are: an l_2 budget adds them up in these units. Explicit Euler steps of 0.02 s; starts uniform in [-0.05, 0.05]^4;
    an episode ends beyond 2.4 m or 12 degrees. `horizon` 200 is CartPole-v0, 500 is CartPole-v1.
    """

    observations: ClassVar[int] = 4
    start_numbers: ClassVar[int] = 4

    @property
    def num_classes(self) -> int:
        return 2

    @property
    def returns(self) -> tuple[float, ...]:
        return tuple(float(k) for k in range(1, self.horizon + 1))

    @property
    def decided_by(self) -> tuple[int, ...]:
        # The k-th reward needs that none of k - 1 steps ended the episode. Explicit Euler steps move cart and pole by
        # the speeds of before, so where they are after k - 1 steps follows from k - 2 actions.
        return tuple(max(0, k - 2) for k in range(1, self.horizon + 1))

    def start(self, uniform: NDArray[np.float64]) -> States:
        return uniform * 0.1 - 0.05

    def observe(self, states: States) -> NDArray[np.float64]:
        return states.astype(np.float32).astype(np.float64)

    def step(self, states: States, actions: NDArray[np.int64]) -> tuple[States, NDArray[np.float64], NDArray[np.bool_]]:
        x, speed, angle, spin = states.T
        cosine, sine = np.cos(angle), np.sin(angle)
        push = np.where(actions == 1, _FORCE, -_FORCE)
        common = (push + _MOMENT * np.square(spin) * sine) / _TOTAL
        turning = (_GRAVITY * sine - cosine * common) / (
            _HALF_LENGTH * (4.0 / 3.0 - _POLE * np.square(cosine) / _TOTAL)
        )
        rolling = common - _MOMENT * turning * cosine / _TOTAL
        after = np.stack([x + _TAU * speed, speed + _TAU * rolling, angle + _TAU * spin, spin + _TAU * turning], axis=1)
        ended = (np.abs(after[:, 0]) > _FARTHEST) | (np.abs(after[:, 2]) > _STEEPEST)
        return after, np.ones(len(after)), ended
