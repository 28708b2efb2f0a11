"""Episodes: one draw per frame, before the stack; streams of their own; budgets kept; and games with known answers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor, nn

from trivet.certify.policy_smoothing import PolicySmoothing
from trivet.control.cartpole import CartPole
from trivet.control.environment import Environment
from trivet.control.episodes import View, play, pushed
from trivet.control.greedy_flip import GreedyFlip
from trivet.control.steady_push import SteadyPush
from trivet.errors import BadValue
from trivet.randomness import generator
from trivet.statistics import gaussian_shift


@dataclass(frozen=True)
class Game(Environment):
    """Nothing is observed but zero for `horizon` steps; the last action is the reward."""

    observations: ClassVar[int] = 1
    start_numbers: ClassVar[int] = 1

    @property
    def num_classes(self) -> int:
        return 2

    @property
    def returns(self) -> tuple[float, ...]:
        return (1.0,)

    @property
    def decided_by(self) -> tuple[int, ...]:
        return (self.horizon,)

    def start(self, uniform: Any) -> Any:
        return np.zeros((len(uniform), 1))

    def observe(self, states: Any) -> Any:
        return np.zeros((len(states), 1))

    def step(self, states: Any, actions: Any) -> Any:
        after = states + 1
        last = after[:, 0] == self.horizon
        return after, last * actions.astype(float), last


class Linear(nn.Module):
    """Action 1 where the weighted sum of the frames exceeds a threshold."""

    def __init__(self, weights: list[float], threshold: float) -> None:
        super().__init__()
        self.register_buffer("weights", torch.tensor(weights))
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        total = x.flatten(1) @ self.weights - self.threshold
        return torch.stack([torch.zeros_like(total), total], 1)


class Recorder(nn.Module):
    """Remembers what it was shown; always pushes left."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.shown.append(x.squeeze(2).clone())
        return torch.tensor([1.0, 0.0]).expand(len(x), 2)


EPISODES = 4_000
SLACK = 5.5 * math.sqrt(0.25 / EPISODES)  # exceeded by chance with probability below 1e-7
BUDGET, SIGMA = 0.3, 0.4
WEIGHTS = [0.5, 0.5, 0.5, 0.5]
GAME, AGENT = Game(frames=4, sigma=SIGMA, horizon=4), Linear(WEIGHTS, -0.2)


def won(adversary: Any, budget: float = BUDGET, agent: nn.Module = AGENT) -> float:
    found = play(GAME, agent, EPISODES, seed=0, purpose="test", adversary=adversary, budget=budget)
    assert float(found.spent.max()) <= budget * (1 + 1e-9)
    return float(found.returns.mean())


def test_a_game_without_attack_is_won_as_often_as_the_noise_allows() -> None:
    assert won(None, 0.0) == pytest.approx(norm.cdf(0.2 / SIGMA), abs=SLACK)


def test_the_best_attack_attains_the_certificate_and_adaptive_ones_do_not_beat_it() -> None:
    bound = gaussian_shift(norm.cdf(0.2 / SIGMA), BUDGET / SIGMA)

    def along(view: View) -> Tensor:
        return torch.full_like(view.observation, -BUDGET * 0.5)

    def waiting(view: View) -> Tensor:
        """Keeps its budget while the agent is losing anyhow, and spends all of it at the last step."""
        if view.step < 3:
            return torch.zeros_like(view.observation)
        return -view.left.sqrt()[:, None]

    def reading(view: View) -> Tensor:
        """Reads the noise so far, and spends evenly over the steps left in episodes still open."""
        so_far = 0.5 * view.history[:, 3 - view.step :].sum((1, 2)) if view.step else torch.zeros(len(view.left))
        wanted = view.left.sqrt() / math.sqrt(4 - view.step)
        return -wanted.where(so_far > -0.6, 0.0)[:, None]

    assert won(along) == pytest.approx(bound, abs=SLACK)
    for adversary in (waiting, reading):
        assert won(adversary) > bound - SLACK
    # A tenth of the episodes: the slack is three times as wide.
    greedy = play(GAME, AGENT, 400, seed=0, purpose="test", adversary=GreedyFlip(draws=4, step=0.1), budget=BUDGET)
    assert bound - 4 * SLACK < float(greedy.returns.mean()) < won(None)
    # The check can fail: what noise of twice the deviation would promise is broken.
    assert won(along) < gaussian_shift(norm.cdf(0.2 / SIGMA), BUDGET / (2 * SIGMA)) - SLACK


def test_the_whole_chain_certifies_less_than_the_best_attack_leaves() -> None:
    returns = play(GAME, AGENT, 5_000, seed=0, purpose="certification").returns
    found = PolicySmoothing(SIGMA, GAME.returns, episodes=5_000, alpha=1e-6).certify(returns)
    for budget in (0.0, 0.1, 0.3, 1.0):
        assert found.mean(budget) < norm.cdf((0.2 - budget) / SIGMA)


def test_a_frame_noised_anew_at_each_look_breaks_the_certificate_and_the_charge_mends_it() -> None:
    """The mutant: noise after stacking. Five looks at one shifted frame average the noise away."""
    looks, budget = 5, 0.2
    shift = torch.zeros(EPISODES, 1)

    def rate(moved: float) -> float:
        noise = SIGMA * torch.randn(EPISODES, looks, generator=generator(0, "looks"))
        return float(((shift + moved + noise).mean(1) > -0.2).double().mean())

    p = rate(0.0)
    assert rate(-budget) < gaussian_shift(p, budget / SIGMA) - 2 * SLACK
    assert rate(-budget) > gaussian_shift(p, math.sqrt(looks) * budget / SIGMA) - 2 * SLACK


def test_each_frame_has_one_draw_of_noise_for_as_long_as_it_is_seen() -> None:
    recorder = Recorder()
    play(CartPole(frames=3, sigma=0.5, horizon=8), recorder, 4, seed=0, purpose="test")
    shown = recorder.shown
    assert torch.equal(shown[0][:, 0], shown[0][:, 2])  # copies of the first noisy frame
    for before, after in pairwise(shown):
        assert torch.equal(before[:, 1:], after[:, :-1])
        assert not torch.equal(before[:, -1], after[:, -1])


def test_noise_has_the_deviation_that_is_asked_for() -> None:
    recorder = Recorder()
    play(CartPole(sigma=0.5, horizon=1), recorder, 5_000, seed=0, purpose="test")
    deviation = float(torch.cat(recorder.shown).std())  # starts add 0.05 / sqrt(3), a thousandth of the variance
    assert deviation == pytest.approx(0.5, rel=0.03)  # of 20,000 numbers: six deviations of the estimate


def test_episodes_are_the_same_whatever_is_played_beside_them_and_differ_by_purpose() -> None:
    cart, policy = CartPole(sigma=1.0, horizon=60), Linear([0.0, 0.0, 1.0, 0.5], 0.0)
    many, few = (play(cart, policy, count, seed=1, purpose="test") for count in (1200, 1100))
    assert torch.equal(many.returns[:1100], few.returns)
    assert not torch.equal(play(cart, policy, 1100, seed=1, purpose="other").returns, few.returns)
    assert not torch.equal(play(cart, policy, 1100, seed=2, purpose="test").returns, few.returns)
    assert torch.equal(few.returns, few.steps.double())


def test_a_return_of_k_is_decided_by_the_observations_that_cartpole_names() -> None:
    """Whatever is shown after them, {R >= k} stays; with one observation less, it changes in some of 2,000 episodes."""
    cart, policy = CartPole(sigma=3.0, horizon=40), Linear([0.0, 0.0, 1.0, 0.5], 0.0)
    clean = play(cart, policy, 2_000, seed=1, purpose="test").returns
    needed = dict(zip(cart.returns, cart.decided_by, strict=True))
    for first in (8, 14, 20):

        def blinding(view: View, first: int = first) -> Tensor:
            wrong = -100.0 * (view.observation[:, 2:3] + 0.5 * view.observation[:, 3:4]).sign()
            return wrong.expand_as(view.observation) * (view.step >= first)

        blind = play(cart, policy, 2_000, seed=1, purpose="test", adversary=blinding, budget=1e4).returns
        changed = [k for k in cart.returns if not torch.equal(clean >= k, blind >= k)]
        assert min(needed[k] for k in changed) == first + 1


def test_an_adversary_that_overspends_is_refused() -> None:
    with pytest.raises(BadValue, match=r"spent more than its budget=0\.3"):
        won(lambda view: torch.full_like(view.observation, 0.2))


def test_an_adversary_sees_noisy_history_and_true_present() -> None:
    """And the values it computes for the frame the agent will see are those the agent computes."""
    recorder, seen = Recorder(), []

    def looking(view: View) -> Tensor:
        seen.append((view.observation, view.history, view.values(view.observation[None].expand(2, -1, -1))))
        return torch.zeros_like(view.observation)

    cart = CartPole(frames=3, sigma=0.5, horizon=4)
    play(cart, recorder, 5, seed=0, purpose="test", adversary=looking, budget=0.1)
    stacks = recorder.shown[1::2]  # every other look is the agent's
    for step in range(1, 4):
        observation, history, values = seen[step]
        assert torch.equal(history.float(), stacks[step][:, :-1])
        assert not torch.equal(observation.float(), stacks[step][:, -1])
        assert values.shape == (2, 5, 2)
    # Recorder's looks of the adversary, two draws of five episodes, hold the same frames.
    assert torch.equal(recorder.shown[2][:5, :-1], stacks[1][:, :-1])
    assert torch.equal(recorder.shown[0][:5, 0], recorder.shown[0][:5, 2])


def test_pushing_drops_the_oldest_frame() -> None:
    stacks = torch.arange(6.0).view(1, 3, 2)
    assert pushed(stacks, torch.tensor([[9.0, 8.0]])).tolist() == [[[2, 3], [4, 5], [9, 8]]]


# The greedy attack.


def test_without_noise_a_flip_costs_the_distance_to_the_boundary() -> None:
    """One frame, no noise, boundary at distance 0.2: within 0.25 the flip is found for about 0.2, within 0.15 never."""
    game, agent = Game(horizon=1), Linear([1.0], -0.2)
    found = play(game, agent, 3, seed=0, purpose="test", adversary=GreedyFlip(step=0.01), budget=0.25)
    assert found.returns.tolist() == [0.0] * 3
    assert 0.2 < float(found.spent.max()) < 0.2 + 2 * 0.01
    held = play(game, agent, 3, seed=0, purpose="test", adversary=GreedyFlip(step=0.01), budget=0.15)
    assert held.returns.tolist() == [1.0] * 3
    assert held.spent.tolist() == [0.0] * 3


def test_actions_near_the_best_are_no_targets() -> None:
    game, agent = Game(horizon=1), Linear([1.0], -0.2)
    for threshold, left in ((0.1, 0.0), (0.3, 1.0)):
        attack = GreedyFlip(threshold, step=0.01)
        found = play(game, agent, 3, seed=0, purpose="test", adversary=attack, budget=0.5)
        assert found.returns.tolist() == [left] * 3


def test_of_several_flips_the_one_to_the_worst_action_is_taken() -> None:
    class Three(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1)[:, 0]
            return torch.stack([torch.ones_like(x), 0.8 + x, 0.5 - 5 * x], 1)

    none = torch.Generator()
    seen, left = torch.zeros(2, 1, dtype=torch.float64), torch.tensor([1.0, 0.0], dtype=torch.float64)
    view = View(Three(), seen, torch.zeros(2, 0, 1), left, 0, 0.0, none)
    shift = GreedyFlip(step=0.01)(view)
    assert -0.13 < float(shift[0]) < -0.1  # to the third action; the second would be flipped to at 0.2
    assert float(shift[1]) == 0.0  # no budget left


@pytest.mark.parametrize("settings", [{"threshold": -1.0}, {"draws": 0}, {"step": 0.0}], ids=str)
def test_an_attack_without_sense_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(BadValue, match=f"{next(iter(settings))}="):
        GreedyFlip(**settings)


# Steady pushes.


def test_steady_pushes_spend_the_budget_in_equal_parts_and_attain_the_certificate() -> None:
    """Against the linear game's agent they are the best attack: along the weights, an equal share for each step."""
    found = play(GAME, AGENT, EPISODES, seed=0, purpose="test", adversary=SteadyPush(4, draws=64), budget=BUDGET)
    assert found.spent.tolist() == pytest.approx([BUDGET] * EPISODES)
    few = play(Game(horizon=1), Linear([1.0], -0.2), 3, seed=0, purpose="test", adversary=SteadyPush(1), budget=0.25)
    assert few.returns.tolist() == [0.0] * 3
    assert few.spent.tolist() == pytest.approx([0.25] * 3)
    bound = gaussian_shift(norm.cdf(0.2 / SIGMA), BUDGET / SIGMA)
    assert float(found.returns.mean()) > bound - SLACK


def test_a_push_goes_against_the_preference_and_stops_after_its_steps() -> None:
    left = torch.tensor([0.09, 0.09], dtype=torch.float64)
    seen = torch.tensor([[0.5], [-0.5]], dtype=torch.float64)
    for step, expected in ((0, [-0.15, 0.15]), (3, [-0.3, 0.3]), (4, [0.0, 0.0])):
        view = View(Linear([1.0], 0.0), seen, torch.zeros(2, 0, 1), left, step, 0.0, torch.Generator())
        assert SteadyPush(4)(view).flatten().tolist() == pytest.approx(expected)
    with pytest.raises(BadValue, match="steps=0"):
        SteadyPush(0)
    with pytest.raises(BadValue, match="draws=0"):
        SteadyPush(draws=0)
