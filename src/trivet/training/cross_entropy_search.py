"""The cross-entropy method on the weights of a small policy (Rubinstein 1999; Szita & Lőrincz 2006).

For policies of a few dozen weights it needs seconds and no gradient. An interrupted stage starts anew.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from trivet import display
from trivet.claims import Effect
from trivet.control.environment import Environment
from trivet.control.episodes import pushed
from trivet.errors import require
from trivet.methods import method, spec_of
from trivet.randomness import generator
from trivet.training.dqn import trained_further
from trivet.training.stage import Checkpoint, Context, Stage


@method(
    title="Cross-entropy search of policies",
    paper="Rubinstein 1999; with noise: Szita & Lőrincz, Neural Computation 2006",
    year=2006,
    legs="robust",
)
@dataclass(frozen=True)
class CrossEntropySearch(Stage):
    """All weights at once are drawn from N(m, diag(s^2)); m and s become mean and deviation of the best draws.

    Each iteration draws `population` weight vectors, plays `episodes` noisy episodes with each (the same starts and
    noise for all, so that they are compared and not their luck), and keeps the `elite` with the greatest mean
    discounted return. s is widened by a constant that falls to 0 over the iterations, which keeps it from collapsing
    early. The result is m. The first m is zero and the first s is `spread`.

    Attributes:
        environment: the recipe's, with its noise.
        iterations, population, elite, episodes: as above.
        spread: standard deviation of the first draws.
        widening: what is added to s at first.
        gamma: discount of the score; below 1 it prefers early rewards.
    """

    environment: Environment
    iterations: int = 25
    population: int = 60
    elite: int = 10
    episodes: int = 16
    spread: float = 1.0
    widening: float = 0.1
    gamma: float = 1.0

    def __post_init__(self) -> None:
        for name in ("iterations", "population", "elite", "episodes"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1.")
        require(1 < self.elite <= self.population, f"elite={self.elite} must lie between 2 and {self.population}.")
        require(0 < self.spread < math.inf, f"spread={self.spread} must be positive and finite.")
        require(0 <= self.widening < math.inf, f"widening={self.widening} must be finite and not negative.")
        require(0 < self.gamma <= 1, f"gamma={self.gamma} must lie in (0, 1].")

    def effect(self) -> Effect:
        return trained_further()

    @torch.no_grad()
    def run(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        context.files.rewind_log(0)
        model = checkpoint.model.to("cpu").eval()
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        middle = torch.zeros(sum(shape.numel() for shape in shapes.values()))
        spread = torch.full_like(middle, self.spread)
        best = -math.inf
        with display.progress(f"{context.files.name} iterations", self.iterations) as advance:
            for iteration in range(self.iterations):
                source = generator(context.seed, "cross-entropy", context.files.number, iteration)
                drawn = middle + spread * torch.randn(self.population, len(middle), generator=source)
                scores = self._scores(model, _split(drawn, shapes), source)
                chosen = drawn[scores.topk(self.elite).indices]
                left = 1 - (iteration + 1) / self.iterations
                middle, spread = chosen.mean(0), chosen.std(0) + self.widening * left
                best = float(scores.max())
                context.files.log({"step": iteration, "score": float(scores.mean()), "best": best})
                advance(1, note=f"best {best:.4g}")
        for name, values in _split(middle[None], shapes).items():
            model.get_parameter(name).copy_(values[0])
        record = {"stage": "cross_entropy_search", "settings": spec_of(self), "last_best_score": best}
        return replace(checkpoint, model=model, history=[*checkpoint.history, record])

    def _scores(self, model: nn.Module, weights: dict[str, Tensor], source: torch.Generator) -> Tensor:
        """The mean discounted return [P] of each of P weight vectors."""
        environment, buffers = self.environment, dict(model.named_buffers())

        def values(parameters: dict[str, Tensor], stacks: Tensor) -> Tensor:
            return functional_call(model, parameters | buffers, (stacks,))

        shape = (self.episodes, environment.observations)
        uniform = torch.rand(self.episodes, environment.start_numbers, generator=source, dtype=torch.float64)
        states = environment.start(uniform.repeat(self.population, 1).numpy())
        count = len(states)
        scores, running = torch.zeros(count, dtype=torch.float64), torch.ones(count, dtype=torch.bool)
        stacks = torch.zeros(count, environment.frames, environment.observations, dtype=torch.float64)
        for step in range(environment.horizon):
            noise = environment.sigma * torch.randn(shape, generator=source, dtype=torch.float64)
            frames = torch.from_numpy(environment.observe(states)) + noise.repeat(self.population, 1)
            stacks = frames[:, None].expand_as(stacks) if step == 0 else pushed(stacks, frames)
            seen = stacks.float().unsqueeze(2).unflatten(0, (self.population, self.episodes))
            actions = vmap(values)(weights, seen).argmax(2).flatten()
            states, rewards, ended = environment.step(states, actions.numpy())
            scores += self.gamma**step * running * torch.from_numpy(rewards)
            running &= ~torch.from_numpy(ended)
            if not bool(running.any()):
                break
        return scores.view(self.population, self.episodes).mean(1)


def _split(vectors: Tensor, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """The parameters [P, ...] by name that are laid end to end in `vectors` [P, W]."""
    parts = vectors.split([shape.numel() for shape in shapes.values()], 1)
    return {name: part.unflatten(1, shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
