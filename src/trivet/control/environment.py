"""The protocol of an environment: many episodes side by side, as functions of their states, and how an agent sees them.

Environments keep no state of their own and draw no random numbers, so that an episode is a function of its start, its
noise and the agent's actions: whoever plays it can batch, repeat, or attack it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from trivet.errors import require
from trivet.methods import spec_of

States = NDArray[np.floating]
"""[N, S], the states of N episodes."""


@dataclass(frozen=True)
class Environment(ABC):
    """N episodes at a time, of at most `horizon` steps, with rewards that are never negative.

    What an agent sees is part of it: at each step the present observation gets Gaussian noise, once, and is then pushed
    into a stack of the last `frames` noisy ones; at the start the stack holds copies of the first. The same view serves
    training, certification and attack.

    Attributes:
        frames: how many of the last observations the agent sees.
        sigma: standard deviation of the noise on each number of an observation, in its units; 0 for none.
        horizon: where an episode is cut off, which is part of the environment: more steps earn nothing.
    """

    room: ClassVar[str] = "control"
    observations: ClassVar[int]
    """How many numbers an observation has."""
    start_numbers: ClassVar[int]
    """How many random numbers a start needs."""
    r_min: ClassVar[float] = 0.0
    """The least return."""

    frames: int = 1
    sigma: float = 0.0
    horizon: int = 200

    def __post_init__(self) -> None:
        require(self.frames >= 1, f"frames={self.frames} must be at least 1.")
        require(0 <= self.sigma < math.inf, f"sigma={self.sigma} must be finite and not negative.")
        require(self.horizon >= 1, f"horizon={self.horizon} must be at least 1.")

    @property
    def title(self) -> str:
        """What sentences call it: its name in recipes, or where the user's own class lives."""
        spec = spec_of(self)
        return str(spec.get("name") or spec["import"])

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(frames, 1, observations): what a model is built for, as for images."""
        return self.frames, 1, self.observations

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """How many actions there are."""

    @property
    @abstractmethod
    def returns(self) -> tuple[float, ...]:
        """Every return above `r_min` that is possible, in order: a grid known before any episode."""

    @property
    @abstractmethod
    def decided_by(self) -> tuple[int, ...]:
        """For each of `returns`, how many observations, from the first, decide whether an episode returns as much."""

    @abstractmethod
    def start(self, uniform: NDArray[np.float64]) -> States:
        """The first states [N, S] for numbers [N, `start_numbers`] drawn uniformly from [0, 1)."""

    @abstractmethod
    def observe(self, states: States) -> NDArray[np.float64]:
        """[N, `observations`], what the sensors measure."""

    @abstractmethod
    def step(self, states: States, actions: NDArray[np.int64]) -> tuple[States, NDArray[np.float64], NDArray[np.bool_]]:
        """The next states, the rewards [N] of `actions` [N], and which episodes [N] have ended."""
