"""Learning-rate schedules: a factor of the peak rate as a function of how much of training is done."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from trivet.errors import require
from trivet.methods import method


class Schedule(ABC):
    """`schedule(fraction)` is the factor, in [0, 1], at `fraction` in [0, 1) of training."""

    room: ClassVar[str] = "training"

    @abstractmethod
    def __call__(self, fraction: float) -> float: ...


@method(title="Constant rate")
@dataclass(frozen=True)
class Constant(Schedule):
    """The peak rate throughout."""

    def __call__(self, fraction: float) -> float:
        return 1.0


@method(title="Cosine schedule", paper="Loshchilov & Hutter, ICLR 2017", year=2017)
@dataclass(frozen=True)
class Cosine(Schedule):
    """Linear warm-up over the first `warmup` of training, then half a cosine down to zero."""

    warmup: float = 0.0

    def __post_init__(self) -> None:
        require(0 <= self.warmup < 1, f"warmup={self.warmup} must lie in [0, 1).")

    def __call__(self, fraction: float) -> float:
        if fraction < self.warmup:
            return fraction / self.warmup
        return 0.5 * (1.0 + math.cos(math.pi * (fraction - self.warmup) / (1.0 - self.warmup)))


@method(title="One-cycle schedule", paper="Smith & Topin 2017; triangular as in Wong et al., ICLR 2020", year=2017)
@dataclass(frozen=True)
class OneCycle(Schedule):
    """Up in a straight line until `peak` of training, down to zero in another."""

    peak: float = 0.4

    def __post_init__(self) -> None:
        require(0 < self.peak < 1, f"peak={self.peak} must lie strictly between 0 and 1.")

    def __call__(self, fraction: float) -> float:
        return fraction / self.peak if fraction < self.peak else (1.0 - fraction) / (1.0 - self.peak)


@method(title="Piecewise constant rate")
@dataclass(frozen=True)
class Piecewise(Schedule):
    """Multiplied by `factor` at each fraction in `at`, e.g. at (0.5, 0.75) by 0.1."""

    at: tuple[float, ...] = (0.5, 0.75)
    factor: float = 0.1

    def __post_init__(self) -> None:
        require(all(0 < f < 1 for f in self.at), f"at={self.at} must be fractions of training between 0 and 1.")
        require(0 < self.factor <= 1, f"factor={self.factor} must lie in (0, 1].")

    def __call__(self, fraction: float) -> float:
        return self.factor ** sum(fraction >= boundary for boundary in self.at)
