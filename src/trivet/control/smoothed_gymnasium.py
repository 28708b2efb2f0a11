"""Policy smoothing for any Gymnasium environment and any policy: the noisy wrapper, and the episodes to certify from.

    import gymnasium
    from trivet.certify.policy_smoothing import PolicySmoothing
    from trivet.control.smoothed_gymnasium import smoothed, smoothed_returns

    noisy = smoothed(gymnasium.make("Acrobot-v1"), sigma=0.1, frames=4, seed=0)      # to train on, with any library
    returns = smoothed_returns(lambda: gymnasium.make("Acrobot-v1"), policy, 1000, sigma=0.1, frames=4, seed=1)
    PolicySmoothing(0.1, thresholds=(-400, -300, -200, -100), r_min=-500, episodes=1000).certify(returns).mean(0.05)

The environment must end or cut off its episodes by itself, and say so; that is part of it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trivet.errors import TrivetError, require
from trivet.randomness import derive_seed

if TYPE_CHECKING:
    import gymnasium

Observations = NDArray[np.float64]


def smoothed(environment: gymnasium.Env[Any, Any], sigma: float, *, frames: int = 1, seed: int = 0) -> Any:
    """`environment` as the smoothed agent sees it: observations [frames, ...] float64, each noised once, then stacked.

    The noise N(0, sigma^2 I) is in the units of the observations and never clipped. At a reset the stack holds copies
    of the first noisy frame. Noise is drawn from a stream of its own, named (seed, "policy smoothing").

    Raises:
        BadValue: a sigma or number of frames that makes no sense, observations that are no numbers, or a wrapper inside
            that breaks the certificate: stacking before the noise, or normalisation by running statistics.
        TrivetError: gymnasium is not installed.
    """
    library = _gymnasium()
    require(0 <= sigma < math.inf, f"sigma={sigma} must be finite and not negative.")
    require(frames >= 1, f"frames={frames} must be at least 1.")
    space: Any = environment.observation_space
    require(
        isinstance(space, library.spaces.Box),
        f"observations must be arrays of numbers, a Box; {space} is none, and Gaussian noise does not hide a choice.",
    )

    inner: Any = environment
    while isinstance(inner, library.Wrapper):
        name = type(inner).__name__
        require(
            not isinstance(inner, library.wrappers.FrameStackObservation),
            f"{name} stacks frames before the noise, which would be drawn anew for each look; give frames= here.",
        )
        require(
            not isinstance(inner, library.wrappers.NormalizeObservation),
            f"{name} divides by statistics of what it has seen, attacked or not; divide by constants instead.",
        )
        inner = inner.env

    class Smoothed(library.Wrapper):  # type: ignore[misc,name-defined]
        """Noise first, then the stack."""

        def __init__(self) -> None:
            super().__init__(environment)
            shape = (frames, *space.shape)
            self.observation_space = library.spaces.Box(-np.inf, np.inf, shape, np.float64)
            self.source = np.random.default_rng(derive_seed(seed, "policy smoothing"))
            self.stack: deque[Observations] = deque(maxlen=frames)

        def reset(self, **options: Any) -> tuple[Observations, dict[str, Any]]:
            observation, info = self.env.reset(**options)
            self.stack.extend([self._noised(observation)] * frames)
            return np.stack(self.stack), info

        def step(self, action: Any) -> tuple[Observations, Any, bool, bool, dict[str, Any]]:
            observation, reward, ended, cut, info = self.env.step(action)
            self.stack.append(self._noised(observation))
            return np.stack(self.stack), reward, ended, cut, info

        def _noised(self, observation: Any) -> Observations:
            seen = np.asarray(observation, dtype=np.float64)
            return seen + sigma * self.source.standard_normal(seen.shape)

    return Smoothed()


def smoothed_returns(
    make: Callable[[], gymnasium.Env[Any, Any]],
    policy: Callable[[Observations], Any],
    episodes: int,
    *,
    sigma: float,
    frames: int = 1,
    seed: int = 0,
) -> Tensor:
    """Returns [episodes] float64 of independent episodes in which `policy` maps noisy stacks to actions.

    Episode i resets the environment with, and draws its noise from, seeds named by (seed, i). Use another `seed` than
    for training and for choosing the policy.
    """
    require(episodes >= 1, f"episodes={episodes} must be at least 1.")
    environment, returns = make(), torch.zeros(episodes, dtype=torch.float64)
    for number in range(episodes):
        noisy = smoothed(environment, sigma, frames=frames, seed=derive_seed(seed, "noise", number))
        seen, _ = noisy.reset(seed=derive_seed(seed, "episode", number) % 2**31)
        over = False
        while not over:
            seen, reward, ended, cut, _ = noisy.step(policy(seen))
            returns[number] += float(reward)
            over = ended or cut
    environment.close()
    return returns


def _gymnasium() -> Any:
    try:
        import gymnasium
    except ImportError:
        raise TrivetError("gymnasium is not installed; pip install 'trivet[rl]'.") from None
    return gymnasium
