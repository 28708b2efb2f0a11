"""Playing episodes: noise before stacking, once for each frame, a random stream for each episode, and an adversary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from trivet.control.environment import Environment
from trivet.display import Advance
from trivet.errors import require
from trivet.models.modes import device_of, evaluating
from trivet.randomness import generator

_BLOCK = 1000  # episodes played side by side


@dataclass(frozen=True, eq=False)
class Episodes:
    """What N episodes came to.

    Attributes:
        returns: [N] float64, sums of rewards.
        steps: [N] int64, how many steps they took.
        spent: [N] float64, the l_2 length of all an adversary did to their observations.
    """

    returns: Tensor
    steps: Tensor
    spent: Tensor


@dataclass(frozen=True, eq=False)
class View:
    """What an adversary sees of n running episodes before it shifts their present observations.

    Everything but the noise to come: the true observation, the noisy frames already seen by the agent, and the policy.

    Attributes:
        policy: maps stacks [B, frames, 1, D] to a value for each action [B, K]; the agent takes the greatest.
        observation: [n, D] float64, as the sensors measured it.
        history: [n, frames - 1, D] float64, the noisy frames seen before; meaningless at the first step.
        left: [n] float64, the squared l_2 budget that is left.
        step: how many steps were taken.
        sigma: of the noise to come.
        generator: for the adversary's own draws.
    """

    policy: nn.Module
    observation: Tensor
    history: Tensor
    left: Tensor
    step: int
    sigma: float
    generator: torch.Generator

    def values(self, frame: Tensor) -> Tensor:
        """The policy's values [..., n, K] if its newest frame were `frame` [..., n, D]; differentiable."""
        older = self.history.expand(*frame.shape[:-1], *self.history.shape[-2:])
        newest = frame.unsqueeze(-2)
        stack = newest.expand_as(torch.cat([older, newest], -2)) if self.step == 0 else torch.cat([older, newest], -2)
        return policy_values(self.policy, stack.flatten(0, -3)).view(*frame.shape[:-1], -1)


class Adversary(Protocol):
    """Chooses what is added to the observations of all running episodes."""

    def __call__(self, view: View) -> Tensor:
        """[n, D] float64, of squared lengths of at most `view.left`."""


def policy_values(policy: nn.Module, stacks: Tensor) -> Tensor:
    """A value for each action [N, K] from `stacks` [N, frames, D], in the policy's float32."""
    return policy(stacks.float().unsqueeze(2).to(device_of(policy))).cpu()


def pushed(stacks: Tensor, frames: Tensor) -> Tensor:
    """`stacks` [N, F, D] after the newest `frames` [N, D] came and the oldest went."""
    return torch.cat([stacks[:, 1:], frames[:, None]], 1)


@torch.no_grad()
def play(
    environment: Environment,
    policy: nn.Module,
    count: int,
    *,
    seed: int,
    purpose: str,
    adversary: Adversary | None = None,
    budget: float = 0.0,
    advance: Advance | None = None,
) -> Episodes:
    """`count` independent episodes of the smoothed agent, against `adversary` with an l_2 `budget` for each.

    Episode i draws its start and its noise from a generator named (seed, purpose, i), so that episodes of different
    purposes are independent, as a certificate needs them to be of those that chose the policy. Where an episode ends,
    its last observation is never shown. The policy is used in eval mode and left as it was.

    Raises:
        BadValue: an adversary that overspends.
    """
    require(count >= 1, f"count={count} must be at least 1.")
    require(budget >= 0, f"budget={budget} must not be negative.")
    parts = []
    with evaluating(policy):
        for first in range(0, count, _BLOCK):
            numbers = range(first, min(first + _BLOCK, count))
            parts.append(_block(environment, policy, numbers, seed, purpose, adversary, budget))
            if advance:
                advance(len(numbers))
    returns, steps, spent = (torch.cat(column) for column in zip(*parts, strict=True))
    return Episodes(returns, steps, spent)


def _block(
    environment: Environment,
    policy: nn.Module,
    numbers: range,
    seed: int,
    purpose: str,
    adversary: Adversary | None,
    budget: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns, steps and spent budgets of the episodes `numbers`."""
    count = len(numbers)
    uniform, noise = _draws(environment, [generator(seed, purpose, number) for number in numbers])
    returns, steps, spent = torch.zeros(3, count, dtype=torch.float64)
    states = environment.start(uniform.numpy())
    running = torch.arange(count)
    stacks = torch.zeros(count, environment.frames, environment.observations, dtype=torch.float64)
    for step in range(environment.horizon):
        seen = torch.from_numpy(environment.observe(states))
        if adversary is not None:
            left = (budget**2 - spent[running]).clamp(min=0.0)
            own = generator(seed, f"{purpose} adversary", numbers.start, step)
            view = View(policy, seen, stacks[:, 1:], left, step, environment.sigma, own)
            shift = adversary(view).double()
            cost = shift.square().sum(1)
            require(bool((cost <= left * (1 + 1e-9)).all()), f"the adversary spent more than its budget={budget:g}.")
            spent[running] += cost
            seen = seen + shift
        frames = seen + environment.sigma * noise[running, step]
        stacks = frames[:, None].expand_as(stacks).clone() if step == 0 else pushed(stacks, frames)
        actions = policy_values(policy, stacks).argmax(1)
        states, rewards, ended = environment.step(states, actions.numpy())
        returns[running] += torch.from_numpy(rewards)
        steps[running] += 1
        going = ~ended
        states, stacks, running = states[going], stacks[torch.from_numpy(going)], running[torch.from_numpy(going)]
        if not len(running):
            break
    return returns, steps.long(), spent.sqrt()


def _draws(environment: Environment, sources: list[torch.Generator]) -> tuple[Tensor, Tensor]:
    """Uniform numbers [N, S] for the starts and normal ones [N, T, D] for the noise, from a generator per episode."""
    shape = (environment.horizon, environment.observations)
    uniform = [torch.rand(environment.start_numbers, generator=each, dtype=torch.float64) for each in sources]
    noise = [torch.randn(shape, generator=each, dtype=torch.float64) for each in sources]
    return torch.stack(uniform), torch.stack(noise)
