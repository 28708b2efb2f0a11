"""The vectorised environments equal Gymnasium's step by step, and say truly which returns are possible and when."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from trivet.control.cartpole import CartPole
from trivet.control.environment import Environment
from trivet.control.mountain_car import MountainCar
from trivet.errors import BadValue
from trivet.methods import build, spec_of

gymnasium = pytest.importorskip("gymnasium", reason="gymnasium is not installed; pip install 'trivet[rl]'")


def compared(environment: Environment, theirs: list[Any], states: Any, act: Any, action: Any) -> int:
    """Steps taken in all of `theirs` from `states` until each ended, every one compared bit for bit; their number."""
    alive, steps = np.ones(len(theirs), dtype=bool), 0
    while alive.any():
        actions = act(states)
        states, rewards, ended = environment.step(states, actions)
        for number in np.flatnonzero(alive):
            observation, reward, over, cut, _ = theirs[number].step(action(actions[number]))
            assert np.array_equal(theirs[number].unwrapped.state, states[number])
            assert np.array_equal(observation, states[number].astype(np.float32))
            assert over == ended[number]
            if isinstance(environment, CartPole):
                assert reward == rewards[number]
            else:  # theirs pays 100 for the goal and takes a tenth of the squared force for each step
                assert (reward > 50) == (rewards[number] == 1)
            alive[number] = not (over or cut)
            steps += 1
    return steps


def test_cartpole_is_gymnasiums_bit_for_bit_over_whole_episodes() -> None:
    rng = np.random.default_rng(0)
    theirs = [gymnasium.make("CartPole-v1", max_episode_steps=200) for _ in range(40)]
    for seed, each in enumerate(theirs):
        each.reset(seed=seed)
    states = np.array([each.unwrapped.state for each in theirs])

    def act(states: Any) -> Any:  # good enough to last, random enough to go everywhere
        lean = states[:, 2] + 0.5 * states[:, 3]
        return (lean + rng.normal(0, 0.3, len(states)) > 0).astype(np.int64)

    assert compared(CartPole(), theirs, states, act, int) > 4000


def test_mountain_car_is_gymnasiums_bit_for_bit_from_float32_states() -> None:
    rng, car = np.random.default_rng(0), MountainCar(forces=(-1.0, -0.3, 0.0, 0.7, 1.0))
    theirs = [gymnasium.make("MountainCarContinuous-v0") for _ in range(20)]
    states = np.array([each.reset(seed=seed)[0] for seed, each in enumerate(theirs)])
    for each, state in zip(theirs, states, strict=True):
        each.unwrapped.state = state.copy()

    def act(states: Any) -> Any:  # half of them swing up, the others wander and hit the wall
        swing = np.where(states[:, 1] >= 0, 4, 0)
        return np.where(rng.random(len(states)) < 0.4, rng.integers(0, 5, len(states)), swing)

    assert compared(car, theirs, states, act, lambda n: np.array([car.forces[n]], dtype=np.float32)) > 2000


@pytest.mark.parametrize("environment", [CartPole(), MountainCar()], ids=["cartpole", "mountain_car"])
def test_starts_fill_gymnasiums_range(environment: Environment) -> None:
    low = environment.start(np.zeros((1, environment.start_numbers)))
    high = environment.start(np.full((1, environment.start_numbers), 1 - 1e-12))
    expected = [-0.05] * 4 if isinstance(environment, CartPole) else [-0.6, 0.0]
    opposite = [0.05] * 4 if isinstance(environment, CartPole) else [-0.4, 0.0]
    np.testing.assert_allclose(low[0], expected, rtol=1e-6)
    np.testing.assert_allclose(high[0], opposite, rtol=1e-6)


def test_mountain_car_is_observed_in_units_of_its_range() -> None:
    seen = MountainCar().observe(np.array([[-1.2, -0.07], [0.6, 0.07]], dtype=np.float32))
    np.testing.assert_allclose(seen, [[-1, -1], [1, 1]], rtol=1e-6)


def test_what_is_possible_is_known_before() -> None:
    cart, car = CartPole(horizon=7), MountainCar()
    assert cart.returns == (1, 2, 3, 4, 5, 6, 7)
    assert cart.decided_by == (0, 0, 1, 2, 3, 4, 5)
    assert (car.returns, car.decided_by, car.r_min) == ((1.0,), (999,), 0.0)
    assert (cart.input_shape, cart.num_classes) == ((1, 1, 4), 2)
    assert (MountainCar(frames=3).input_shape, car.num_classes) == ((3, 1, 2), 3)
    assert build("control", spec_of(MountainCar(5, 0.1))) == MountainCar(5, 0.1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"frames": 0}, "frames=0"),
        ({"sigma": -1.0}, "sigma=-1"),
        ({"sigma": math.nan}, "sigma=nan"),
        ({"horizon": 0}, "horizon=0"),
        ({"forces": (2.0, 0.0)}, "forces="),
        ({"forces": (1.0,)}, "forces="),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(BadValue, match=words):
        MountainCar(**settings)


def test_the_same_actions_on_other_rows_do_not_matter() -> None:
    """An episode is the same alone and among others."""
    cart = CartPole()
    states = cart.start(torch.rand(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy())
    actions = np.arange(50) % 2
    together, _, _ = cart.step(states, actions)
    alone, _, _ = cart.step(states[7:8], actions[7:8])
    assert np.array_equal(together[7:8], alone)
