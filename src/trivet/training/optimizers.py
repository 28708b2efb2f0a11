"""The optimizers recipes name: torch's own, with their settings checked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from trivet.errors import require
from trivet.methods import method


@dataclass(frozen=True)
class Optimizer(ABC):
    """Settings of an optimizer; `on(parameters)` makes it. `lr` is the peak rate that a schedule scales."""

    room: ClassVar[str] = "training"
    lr: float

    def __post_init__(self) -> None:
        require(self.lr > 0, f"lr={self.lr} must be positive.")

    @abstractmethod
    def on(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer: ...


@method(title="SGD")
@dataclass(frozen=True)
class Sgd(Optimizer):
    """Stochastic gradient descent with heavy-ball or Nesterov momentum."""

    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False

    def on(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            parameters, self.lr, self.momentum, weight_decay=self.weight_decay, nesterov=self.nesterov
        )


@method(title="Adam", paper="Kingma & Ba, ICLR 2015", year=2015)
@dataclass(frozen=True)
class Adam(Optimizer):
    """Adam; `weight_decay` is L2 regularisation, added to the gradient."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0

    def on(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, self.lr, self.betas, weight_decay=self.weight_decay)


@method(title="AdamW", paper="Loshchilov & Hutter, ICLR 2019", year=2019, name="adamw")
@dataclass(frozen=True)
class AdamW(Optimizer):
    """Adam with weight decay decoupled from the gradient."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-2

    def on(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, self.lr, self.betas, weight_decay=self.weight_decay)
