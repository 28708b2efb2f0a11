"""The wrapper for anybody's environment: the same view as ours, streams of its own, and refusals."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch

from trivet.certify.policy_smoothing import PolicySmoothing
from trivet.control.cartpole import CartPole
from trivet.control.episodes import play
from trivet.control.smoothed_gymnasium import smoothed, smoothed_returns
from trivet.errors import BadValue, TrivetError

gymnasium = pytest.importorskip("gymnasium", reason="gymnasium is not installed; pip install 'trivet[rl]'")


def cartpole() -> Any:
    return gymnasium.make("CartPole-v1", max_episode_steps=60)


def lean(stack: Any) -> int:
    """Push to the side the pole leans to, by the mean of the frames."""
    return int(stack[:, 2].mean() + 0.5 * stack[:, 3].mean() > 0)


class Lean(torch.nn.Module):
    """The same for `play`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.squeeze(2).mean(1)
        total = mean[:, 2] + 0.5 * mean[:, 3]
        return torch.stack([torch.zeros_like(total), total], 1)


def test_frames_are_noised_once_then_stacked() -> None:
    environment = smoothed(cartpole(), 0.3, frames=3, seed=1)
    stack, _ = environment.reset(seed=0)
    assert stack.shape == environment.observation_space.shape == (3, 4)
    assert np.array_equal(stack[0], stack[2])
    for _ in range(5):
        before = stack
        stack, *_ = environment.step(0)
        assert np.array_equal(before[1:], stack[:-1])
        assert np.abs(stack[-1] - environment.unwrapped.state).max() < 6 * 0.3
        assert not np.allclose(stack[-1], environment.unwrapped.state, atol=1e-3)


def test_without_noise_it_is_the_environment_itself() -> None:
    environment = smoothed(cartpole(), 0.0)
    stack, _ = environment.reset(seed=0)
    assert np.array_equal(stack[0], cartpole().reset(seed=0)[0])


def test_returns_agree_in_distribution_with_the_vectorised_episodes() -> None:
    """Means of 150 and 2,000 episodes, whose deviations are estimated; six of them: chance below 1e-8."""
    theirs = smoothed_returns(cartpole, lean, 150, sigma=1.0, frames=2, seed=3)
    ours = play(CartPole(2, 1.0, 60), Lean(), 2_000, seed=3, purpose="test").returns
    spread = math.sqrt(float(theirs.var()) / 150 + float(ours.var()) / 2_000)
    assert abs(float(theirs.mean() - ours.mean())) < 6 * spread
    assert float(theirs.std()) > 1
    found = PolicySmoothing(1.0, CartPole(horizon=60).returns, episodes=150).certify(theirs)
    assert 0 < found.mean(0.1) < found.mean(0.0) < float(theirs.mean())


def test_episodes_are_named_by_the_seed_and_differ_from_each_other() -> None:
    once, again, other = (smoothed_returns(cartpole, lean, 20, sigma=1.0, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    assert len(once.unique()) > 3


def stacked(environment: Any) -> Any:
    return gymnasium.wrappers.FrameStackObservation(environment, 4)


def normalised(environment: Any) -> Any:
    return gymnasium.wrappers.NormalizeObservation(environment)


def test_what_cannot_be_smoothed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadValue, match="sigma=-1"):
        smoothed(cartpole(), -1)
    with pytest.raises(BadValue, match="frames=0"):
        smoothed(cartpole(), 0.1, frames=0)
    choice = gymnasium.wrappers.TransformObservation(cartpole(), lambda _: 0, gymnasium.spaces.Discrete(3))
    with pytest.raises(BadValue, match="a Box"):
        smoothed(choice, 0.1)
    for wrapper, words in ((stacked, "stacks frames before the noise"), (normalised, "statistics of what it has seen")):
        with pytest.raises(BadValue, match=words):
            smoothed(gymnasium.wrappers.ClipReward(wrapper(cartpole()), 0, 1), 0.1)
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(TrivetError, match=r"pip install 'trivet\[rl\]'"):
        smoothed(None, 0.1)  # type: ignore[arg-type]
