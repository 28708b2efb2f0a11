"""Deep Q-learning (Mnih et al., Nature 2015) from noisy observations, as policy smoothing trains.

An interrupted stage starts anew: its settings for a CPU take minutes, and every draw is a function of the run's seed.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from trivet import display
from trivet.claims import Effect, Verdict
from trivet.control.environment import Environment
from trivet.control.episodes import play, policy_values, pushed
from trivet.errors import TrivetError, require
from trivet.methods import method, spec_of
from trivet.randomness import generator
from trivet.training.stage import Checkpoint, Context, Stage

_MAX_GRAD_NORM = 10.0


@method(
    title="Deep Q-network (DQN) with noisy observations",
    paper="Mnih et al., Nature 2015; with noise: Kumar, Levine & Feizi, ICLR 2022",
    year=2015,
    legs="robust",
)
@dataclass(frozen=True)
class Dqn(Stage):
    """Q(s, a) is drawn to r + gamma max_a' Q_target(s', a') by Huber loss on replayed steps of noisy episodes.

    s is what the smoothed agent sees, the stack of noisy frames, each with the one draw of noise it had when it was
    seen. Actions are greedy but for a share of random ones that falls linearly from 1 to 0. A cut at the horizon is
    not an end: its s' counts. Per `rollout` steps, `gradient_steps` batches are learnt, and the target network is a
    copy of Q from before the last `target_rollouts` of them (1 in the experiments, whose interval of 10 steps is
    shorter than a rollout, so that it comes to that). Gradients are clipped to length 10. The result are the weights
    with the best mean return in noisy evaluation episodes; the certification episodes are others.

    Defaults are those of the policy smoothing experiments on CartPole: half a million steps, an hour on one core.

    Attributes:
        environment: the recipe's, with its noise.
        steps: of the environment, over all `parallel` episodes.
        parallel: episodes played side by side; 1 in the experiments.
        lr: of Adam.
        gamma: discount.
        buffer: steps kept for replay.
        learning_starts: steps before the first batch.
        batch_size: replayed steps in a batch.
        rollout, gradient_steps: steps taken, then batches learnt.
        target_rollouts: rollouts between two copies to the target network; more is slower and steadier.
        exploration: share of training over which random actions die out.
        evaluation, evaluate_every: episodes of an evaluation, and steps between two.
    """

    environment: Environment
    steps: int = 500_000
    parallel: int = 8
    lr: float = 1e-4
    gamma: float = 0.99
    buffer: int = 100_000
    learning_starts: int = 1_000
    batch_size: int = 1_024
    rollout: int = 256
    gradient_steps: int = 128
    target_rollouts: int = 1
    exploration: float = 0.16
    evaluation: int = 10
    evaluate_every: int = 2_000

    def __post_init__(self) -> None:
        whole = ("steps", "parallel", "buffer", "batch_size", "rollout", "gradient_steps", "target_rollouts")
        for name in (*whole, "evaluation", "evaluate_every"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1.")
        require(self.learning_starts >= 0, f"learning_starts={self.learning_starts} must not be negative.")
        require(0 < self.lr < math.inf, f"lr={self.lr} must be positive and finite.")
        require(0 <= self.gamma <= 1, f"gamma={self.gamma} must lie in [0, 1].")
        require(0 < self.exploration <= 1, f"exploration={self.exploration} must lie in (0, 1].")
        require(
            self.rollout % self.parallel == 0,
            f"rollout={self.rollout} must be a multiple of parallel={self.parallel}, which step together.",
        )

    def effect(self) -> Effect:
        return trained_further()

    def run(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        context.files.rewind_log(0)
        model = checkpoint.model.to(context.device)
        best = _learn(self, model, context)
        record = {"stage": "dqn", "settings": spec_of(self), "steps": self.steps, "best_evaluation": best}
        return replace(checkpoint, model=model.eval(), history=[*checkpoint.history, record])


def trained_further() -> Effect:
    """What learning a policy does to claims about it."""
    changed = (Verdict.VOID, "the weights were trained further")
    kept = (Verdict.KEEP, "training changes values, not shapes")
    no_records = (Verdict.KEEP, "episodes are no records of people")
    return Effect(privacy=no_records, certificate=changed, attack=changed, accuracy=changed, cost=kept)


class _Steps(NamedTuple):
    """B steps: what was seen [B, F, D], done [B], earned [B], seen next [B, F, D], and whether it ended there [B]."""

    seen: Tensor
    actions: Tensor
    rewards: Tensor
    after: Tensor
    ended: Tensor


class _Replay:
    """The last `capacity` steps."""

    def __init__(self, capacity: int, environment: Environment) -> None:
        stack = (capacity, environment.frames, environment.observations)
        self.columns = _Steps(
            torch.zeros(stack),
            torch.zeros(capacity, dtype=torch.int64),
            torch.zeros(capacity),
            torch.zeros(stack),
            torch.zeros(capacity),
        )
        self.capacity, self.written = capacity, 0

    def add(self, steps: _Steps) -> None:
        places = torch.arange(self.written, self.written + len(steps.actions)) % self.capacity
        for column, values in zip(self.columns, steps, strict=True):
            column[places] = values.to(column.dtype)
        self.written += len(steps.actions)

    def draw(self, count: int, source: torch.Generator) -> _Steps:
        rows = torch.randint(min(self.written, self.capacity), (count,), generator=source)
        return _Steps(*(column[rows] for column in self.columns))


class _Actors:
    """Noisy episodes side by side, begun anew where they end."""

    def __init__(self, environment: Environment, count: int, source: torch.Generator) -> None:
        self.environment, self.source = environment, source
        self.states = environment.start(self._uniform(count))
        self.stacks = self._first(count)
        self.ages = torch.zeros(count, dtype=torch.int64)

    def _uniform(self, count: int) -> NDArray[np.float64]:
        numbers = (count, self.environment.start_numbers)
        return torch.rand(numbers, generator=self.source, dtype=torch.float64).numpy()

    def _frames(self) -> Tensor:
        seen = torch.from_numpy(self.environment.observe(self.states))
        return seen + self.environment.sigma * torch.randn(seen.shape, generator=self.source, dtype=torch.float64)

    def _first(self, count: int) -> Tensor:
        return self._frames()[:, None].repeat(1, self.environment.frames, 1)

    def step(self, model: nn.Module, randomly: float) -> _Steps:
        """One step of all episodes, a share `randomly` of the actions drawn uniformly."""
        seen, count = self.stacks, len(self.stacks)
        actions = policy_values(model, seen).argmax(1)
        drawn = torch.randint(self.environment.num_classes, (count,), generator=self.source)
        actions = actions.where(torch.rand(count, generator=self.source) >= randomly, drawn)
        self.states, rewards, ended = self.environment.step(self.states, actions.numpy())
        self.stacks = after = pushed(seen, self._frames())
        self.ages += 1
        over = torch.from_numpy(ended) | (self.ages == self.environment.horizon)
        if bool(over.any()):
            fresh = _Actors(self.environment, int(over.sum()), self.source)
            self.states[over.numpy()] = fresh.states
            self.stacks = after.clone()
            self.stacks[over], self.ages[over] = fresh.stacks, 0
        return _Steps(seen, actions, torch.from_numpy(rewards), after, torch.from_numpy(ended))


def _learn(dqn: Dqn, model: nn.Module, context: Context) -> float:
    """Train `model`, leave the best weights in it, and return their mean evaluation return."""
    environment, seed = dqn.environment, context.seed
    source = generator(seed, "dqn", context.files.number)
    actors, replay = _Actors(environment, dqn.parallel, source), _Replay(dqn.buffer, environment)
    optimizer = torch.optim.Adam(model.parameters(), lr=dqn.lr)
    best, weights = -math.inf, copy.deepcopy(model.state_dict())
    target, due, loss = model, dqn.evaluate_every, torch.tensor(0.0)
    model.eval()
    with display.progress(f"{context.files.name} episodes", dqn.steps) as advance:
        for taken in range(0, dqn.steps, dqn.rollout):
            with torch.no_grad():
                for step in range(taken, taken + dqn.rollout, dqn.parallel):
                    replay.add(actors.step(model, max(0.0, 1 - step / (dqn.exploration * dqn.steps))))
            done = taken + dqn.rollout
            if taken % (dqn.rollout * dqn.target_rollouts) == 0:
                target = copy.deepcopy(model)
            if done > dqn.learning_starts:
                loss = _improve(dqn, model, target, optimizer, replay, source)
            advance(dqn.rollout)
            if done >= due or done >= dqn.steps:
                due += dqn.evaluate_every
                found = play(environment, model, dqn.evaluation, seed=seed, purpose=f"dqn evaluation {done}")
                mean = float(found.returns.mean())
                context.files.log({"step": done, "loss": float(loss), "return": mean})
                advance(0, note=f"return {mean:.4g}")
                if mean > best:
                    best, weights = mean, copy.deepcopy(model.state_dict())
    model.load_state_dict(weights)
    model.zero_grad(set_to_none=True)
    return best


def _improve(
    dqn: Dqn,
    model: nn.Module,
    target: nn.Module,
    optimizer: torch.optim.Optimizer,
    replay: _Replay,
    source: torch.Generator,
) -> Tensor:
    """`gradient_steps` batches against a target network that stands still; the last loss."""
    loss = torch.tensor(0.0)
    for _ in range(dqn.gradient_steps):
        batch = replay.draw(dqn.batch_size, source)
        with torch.no_grad():
            ahead = policy_values(target, batch.after).amax(1)
            wanted = batch.rewards + dqn.gamma * (1 - batch.ended) * ahead
        chosen = policy_values(model, batch.seen).gather(1, batch.actions[:, None]).squeeze(1)
        loss = F.smooth_l1_loss(chosen, wanted)
        if not bool(loss.detach().isfinite()):
            raise TrivetError(f"the loss of DQN is not finite; lower the learning rate (now {dqn.lr:g}).")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), _MAX_GRAD_NORM)
        optimizer.step()
    return loss.detach()
