"""The mechanism of one private step: sampler, clip and noise as one value, so that they and the accountant agree."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from trivet.errors import require

Adjacency = Literal["add_remove", "replace", "zero_out"]
"""What a neighbouring data set is: with one record more or less, with one exchanged, with one that contributes zero."""
NoiseKind = Literal["gaussian", "discrete_gaussian"]


@dataclass(frozen=True)
class Event:
    """What one step releases, as the accountant sees it: a Gaussian mechanism on a sample of the records.

    Attributes:
        sampler: "poisson": every record enters each step by a coin of its own, with probability `rate`. "shuffled":
            every record enters one step of each pass, and a pass has 1 / rate steps; nothing is amplified.
        rate: the probability, or the share of a pass that one step is.
        noise_multiplier: standard deviation of the noise over the sensitivity under `adjacency`.
        adjacency: the neighbours it protects from being told apart.
        noise: its distribution.
    """

    sampler: Literal["poisson", "shuffled"]
    rate: float
    noise_multiplier: float
    adjacency: Adjacency = "add_remove"
    noise: NoiseKind = "gaussian"

    def __post_init__(self) -> None:
        require(0 < self.rate <= 1, f"rate={self.rate} must lie in (0, 1].")
        require(
            0 <= self.noise_multiplier < math.inf,
            f"noise_multiplier={self.noise_multiplier} must be finite and not negative.",
        )
        require(
            self.sampler == "shuffled" or self.adjacency != "replace",
            "adjacency='replace' has no tight account under Poisson sampling; state add_remove, whose epsilon at most "
            "doubles when a record is exchanged.",
        )
        require(
            self.sampler == "poisson" or self.adjacency != "add_remove",
            "adjacency='add_remove' cannot be promised for shuffled batches, whose number tells the number of records; "
            "state zero_out or replace.",
        )


class Sampler(ABC):
    """Chooses the records of a step, and owns the event that this choice makes of the noise."""

    @abstractmethod
    def draw(self, step: int, generator: torch.Generator) -> Tensor:
        """The records [B] int64 of step number `step`; there may be none."""

    @abstractmethod
    def event(self, noise_multiplier: float, adjacency: Adjacency) -> Event: ...


@dataclass(frozen=True)
class Poisson(Sampler):
    """Every record enters every step with probability `rate`, independently of everything else."""

    records: int
    rate: float

    def draw(self, step: int, generator: torch.Generator) -> Tensor:
        # In float64: float32 would round the probability to multiples of 2^-24.
        return (torch.rand(self.records, generator=generator, dtype=torch.float64) < self.rate).nonzero().flatten()

    def event(self, noise_multiplier: float, adjacency: Adjacency) -> Event:
        return Event("poisson", self.rate, noise_multiplier, adjacency)


class Shuffled(Sampler):
    """Every record once in each pass of ceil(records / batch_size) steps, in an order drawn anew for every pass.

    Accounted without amplification: a lower bound on what shuffled batches leak lies far above what Poisson sampling
    of the same rate would cost (Chua et al., ICML 2024), so the two must not be confused.
    """

    def __init__(self, records: int, batch_size: int) -> None:
        self.records, self.batch_size = records, batch_size
        self.per_epoch = -(-records // batch_size)
        self._order, self._epoch = torch.empty(0, dtype=torch.int64), -1

    def draw(self, step: int, generator: torch.Generator) -> Tensor:
        epoch, number = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._order, self._epoch = torch.randperm(self.records, generator=generator), epoch
        return self._order[number * self.batch_size : (number + 1) * self.batch_size]

    def event(self, noise_multiplier: float, adjacency: Adjacency) -> Event:
        return Event("shuffled", 1 / self.per_epoch, noise_multiplier, adjacency)


@dataclass(frozen=True)
class Clip:
    """Scales a record's gradient g by a factor c(||g||) with c(||g||) ||g|| <= max_grad_norm.

    "flat": min(1, C / ||g||). "psac": C / (||g|| + r / (||g|| + r)) with r = 0.01, which never leaves a small
    gradient as small as it was (per-sample adaptive clipping, Xia et al., AAAI 2023).
    """

    max_grad_norm: float
    kind: Literal["flat", "psac"] = "flat"

    def __post_init__(self) -> None:
        require(
            0 < self.max_grad_norm < math.inf,
            f"max_grad_norm={self.max_grad_norm} must be positive and finite: it bounds what one record contributes.",
        )

    def factors(self, norms: Tensor) -> Tensor:
        """The factor [B] of each record, from the norms [B] of its gradients."""
        if self.kind == "flat":
            return self.max_grad_norm / norms.clamp_min(self.max_grad_norm)
        return self.max_grad_norm / (norms + 0.01 / (norms + 0.01))

    def sensitivity(self, adjacency: Adjacency) -> float:
        """How far, in l2, the clipped sums of two neighbouring data sets can lie apart."""
        return 2 * self.max_grad_norm if adjacency == "replace" else self.max_grad_norm


class Noise(ABC):
    """Adds noise to the clipped sums.

    Class attributes:
        kind: its distribution, for the accountant.
        one_by_one: whether `contribution` must see every record alone.
    """

    kind: ClassVar[NoiseKind]
    one_by_one: ClassVar[bool] = False

    def contribution(self, total: list[Tensor], std: float, bound: float) -> list[Tensor]:
        """What is added up: the clipped sums as they are, or put into a form whose sums are exact.

        `std` is that of the noise to come, `bound` the l2 norm that one record is clipped to.
        """
        return total

    @abstractmethod
    def add(self, total: list[Tensor], std: float, generator: torch.Generator) -> list[Tensor]:
        """`total` plus independent noise of standard deviation `std` in every coordinate."""


class GaussianNoise(Noise):
    """N(0, std^2) from PyTorch's generator, in float32.

    The generator is no cryptographic one, and floating-point samples betray in their last bits which sums are
    impossible (Mironov 2012; Haney et al. 2022): a risk against those who see raw updates, which the noise on a grid
    of `DiscreteGaussian` removes.
    """

    kind: ClassVar[NoiseKind] = "gaussian"

    def add(self, total: list[Tensor], std: float, generator: torch.Generator) -> list[Tensor]:
        return [
            each + std * torch.randn(each.shape, generator=generator, device=generator.device).to(each)
            for each in total
        ]


@dataclass(frozen=True)
class Mechanism:
    """Sampler, clip and noise of a step. Everything else about it follows from these.

    Attributes:
        noise_multiplier: z; the noise has standard deviation z times the clip's sensitivity.
        expected: the expected number of records in a step, by which sums are divided. Never the number drawn: that
            would tell it.
    """

    sampler: Sampler
    clip: Clip
    noise: Noise
    noise_multiplier: float
    expected: float
    adjacency: Adjacency = "add_remove"

    @property
    def std(self) -> float:
        """Standard deviation of the noise on the sum of clipped gradients."""
        return self.noise_multiplier * self.clip.sensitivity(self.adjacency)

    @property
    def event(self) -> Event:
        """What one step spends."""
        return replace(self.sampler.event(self.noise_multiplier, self.adjacency), noise=self.noise.kind)

    def contribution(self, total: list[Tensor]) -> list[Tensor]:
        """What the clipped sum over some records (over one, if the noise wants them one by one) adds to the total."""
        return self.noise.contribution(total, self.std, self.clip.max_grad_norm)

    def release(self, total: list[Tensor], generator: torch.Generator) -> list[Tensor]:
        """The noisy mean: (total + noise) / expected, where `total` adds up contributions."""
        return [each / self.expected for each in self.noise.add(total, self.std, generator)]
