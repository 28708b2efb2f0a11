"""Mountain Car: swing an underpowered car up a hill (Moore 1990), with continuous force."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from trivet.control.environment import Environment, States
from trivet.errors import require
from trivet.methods import method

_POWER, _SLOPE, _FASTEST, _LEFT, _RIGHT, _GOAL = 0.0015, 0.0025, 0.07, -1.2, 0.6, 0.45
_MIDDLE, _REACH = np.array([-0.3, 0.0]), np.array([0.9, 0.07])
_cosine = np.frompyfunc(math.cos, 1, 1)  # the vector cosine differs in the last bit


@method(title="Mountain Car, continuous", paper="Moore, Cambridge 1990", year=1990)
@dataclass(frozen=True)
class MountainCar(Environment):
    """Gymnasium's MountainCarContinuous, bit for bit in its float32 states; reward 1 where the goal is reached, else 0.

    That is the reward of policy smoothing's experiments: an episode is won or lost, and its mean return is the rate of
    wins. The agent chooses among a few `forces` in [-1, 1] (the experiments let DDPG choose any), because the methods
    here choose among actions.

    Observed are position and velocity, each moved and divided by fixed constants to [-1, 1], so that noise and budget
    mean the same for both. Starts uniform in [-0.6, -0.4] at rest, drawn in float32 (Gymnasium's are float64 for the
    first step).

    Attributes:
        forces: the actions.
    """

    observations: ClassVar[int] = 2
    start_numbers: ClassVar[int] = 1

    horizon: int = 999
    forces: tuple[float, ...] = (-1.0, 0.0, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            len(self.forces) >= 2 and all(-1 <= force <= 1 for force in self.forces),
            f"forces={list(self.forces)} must be two or more numbers in [-1, 1].",
        )

    @property
    def num_classes(self) -> int:
        return len(self.forces)

    @property
    def returns(self) -> tuple[float, ...]:
        return (1.0,)

    @property
    def decided_by(self) -> tuple[int, ...]:
        return (self.horizon,)

    def start(self, uniform: NDArray[np.float64]) -> States:
        return np.concatenate([uniform * 0.2 - 0.6, np.zeros_like(uniform)], axis=1).astype(np.float32)

    def observe(self, states: States) -> NDArray[np.float64]:
        return (states.astype(np.float64) - _MIDDLE) / _REACH

    def step(self, states: States, actions: NDArray[np.int64]) -> tuple[States, NDArray[np.float64], NDArray[np.bool_]]:
        position, speed = states.T
        force = np.array(self.forces, dtype=np.float32)[actions]
        pull = (_SLOPE * _cosine(3 * position).astype(np.float64)).astype(np.float32)
        speed = np.clip(speed + (force * _POWER - pull), np.float32(-_FASTEST), np.float32(_FASTEST))
        position = np.clip(position + speed, np.float32(_LEFT), np.float32(_RIGHT))
        speed = np.where((position == np.float32(_LEFT)) & (speed < 0), np.float32(0), speed)
        ended = (position >= np.float32(_GOAL)) & (speed >= 0)
        return np.stack([position, speed], axis=1), ended.astype(np.float64), ended
