"""SmartDeal for training: the powers of two themselves learn, one step up or down at a time (Chen et al., 2021)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trivet.compression.compression import Compression, Moment, WeightMap, originals, replace_last
from trivet.compression.smart_deal import Coding, Rebuilt, Slicing, SmartDeal, freeze, nearest_power
from trivet.errors import require
from trivet.methods import method


class Switching(Rebuilt):
    """Q B while Q learns, and B, which is used as it will be rounded; the gradient passes straight through that.

    Buffers:
        support: which coefficients may be other than zero.
        counter: in which direction, and how often, the optimizer wanted each coefficient to move in this epoch.
        before: the coefficients at the start of the step.
        top: the largest power.
    """

    support: Tensor
    counter: Tensor
    before: Tensor
    top: Tensor

    def __init__(self, slicing: Slicing, coding: Coding) -> None:
        super().__init__(slicing, coding)
        shape = (slicing.shape[0] * slicing.parts, slicing.rows, 3)
        self.register_buffer("support", torch.ones(shape, dtype=torch.bool))
        self.register_buffer("counter", torch.zeros(shape, dtype=torch.int16))
        self.register_buffer("before", torch.zeros(shape))
        self.register_buffer("top", torch.tensor(1.0))

    def forward(self, coefficients: Tensor, basis: Tensor) -> Tensor:
        rounded = self.coding.rounded(basis) + (basis - basis.detach())  # the bracket is zero, and has a gradient
        return super().forward(coefficients, rounded)

    @property
    def least(self) -> Tensor:
        """The smallest power."""
        return self.top * 2.0 ** (2 - 2 ** (self.coding.bits - 1))


def switched(q: Tensor, direction: Tensor, least: Tensor, top: Tensor) -> Tensor:
    """Signed powers of two, or zeros, one bucket further in `direction`, which is -1, 0 or 1.

    0.25 goes up to 0.5 and -0.25 to -0.125; zero to ±least, ±least towards zero to zero; beyond ±top nothing goes.
    """
    moved = torch.where(q == 0, direction * least, q * torch.pow(2.0, direction * q.sign()))
    moved = torch.where((q != 0) & (moved.abs() < least), torch.zeros_like(q), moved)
    return torch.where(direction == 0, q, moved.clamp(-top, top))


@method(title="SmartDeal training", paper="Chen et al., 2021", year=2021, legs="small")
@dataclass(frozen=True, kw_only=True)
class SmartDealTraining(SmartDeal):
    """Train on Q B alone: no float copy of the coefficients is kept.

        dC = the optimizer's step for Q;   where |dC| > dead |Q|: counter += sign(dC)
        where |counter| = bar: Q goes one power of two in that direction, and its counter begins again
        B, biases and normalisation learn as usual; all counters begin again every epoch

    The zeros of the first decomposition stay zero for ever. Any optimizer will do: what it would add to Q is read off,
    and taken back. Its momentum of Q is that of the steps it wanted.

    The authors report 10.56x less storage and 4.48x less training energy, on their accelerator.

    Attributes:
        bar: wishes of one direction before a coefficient moves.
        dead: steps smaller than this share of the coefficient, or for a zero of the least power, are no wish.

    The authors' defaults are bar=1 and dead=0, and their `dead` is an absolute size. Such a coefficient doubles at any
    step however small: on the digits, where Adam's steps are all of one size, that cost half of the accuracy, and
    larger bars alone did not help.
    """

    bar: int = 5
    dead: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.bar >= 1, f"bar={self.bar} must be at least 1.")
        require(self.dead >= 0, f"dead={self.dead} must not be negative.")

    def map_for(self, name: str, layer: nn.Module) -> WeightMap:
        weight: Any = layer.weight
        return Switching(Slicing.of(weight.shape), self.coding)

    def _pairs(self, model: nn.Module) -> Iterator[tuple[Tensor, Switching]]:
        layers = self.layers(model)
        for name, each in self.maps(model).items():
            yield originals(layers[name])[0], each

    @torch.no_grad()
    def initialise(self, model: nn.Module) -> None:
        for q, each in self._pairs(model):
            each.support.copy_(q != 0)
            each.top.copy_(nearest_power(q.abs().max()))

    @torch.no_grad()
    def before(self, model: nn.Module, moment: Moment) -> None:
        for q, each in self._pairs(model):
            each.before.copy_(q)
            if moment.starts_epoch:
                each.counter.zero_()

    @torch.no_grad()
    def after(self, model: nn.Module, moment: Moment) -> None:
        for q, each in self._pairs(model):
            wish = q - each.before
            size = torch.where(each.before == 0, each.least, each.before.abs())
            each.counter += (wish.sign() * (wish.abs() > self.dead * size)).to(each.counter.dtype)
            due = (each.counter.abs() >= self.bar) & each.support
            q.copy_(switched(each.before, each.counter.sign() * due, each.least, each.top))
            each.counter.masked_fill_(due, 0)

    def report(self, model: nn.Module) -> dict[str, Any]:
        return {}

    @contextmanager
    def as_shipped(self, model: nn.Module) -> Iterator[None]:
        yield

    @torch.no_grad()
    def end(self, model: nn.Module) -> Compression:
        layers, maps = self.layers(model), self.maps(model)
        for name, layer in layers.items():
            replace_last(layer, Rebuilt(maps[name].slicing, self.coding))
            _, basis = originals(layer)
            basis.copy_(self.coding.rounded(basis))
            freeze(layer, self.coding)
        return self._stored(layers)
