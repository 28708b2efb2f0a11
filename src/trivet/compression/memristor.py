"""Memristor crossbars: weights as pairs of conductances, what they take up, and what variation does to them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from trivet.compression.crossbar import tiles_of
from trivet.compression.levels import Levels
from trivet.compression.masks import Masks
from trivet.errors import require


@dataclass(frozen=True)
class Device:
    """A crossbar of memristors (Yuan et al., ISLPED 2019): 0.1 to 1 uS, 4 bits a cell.

    A weight of b bits is a sign, told by which of two crossbars holds it, and (b - 1) / cell_bits digits, each in
    a crossbar of its own. The other crossbar's cell is not connected.

    Attributes:
        rows, columns: of a crossbar: inputs and outputs.
        cell_bits: of one cell.
        largest: conductance in siemens; the smallest is this over the levels' ratio.
    """

    rows: int = 128
    columns: int = 64
    cell_bits: int = 4
    largest: float = 1e-6

    def slices(self, levels: Levels) -> int:
        """Crossbars that hold the digits of one magnitude."""
        bits = levels.bits - 1
        require(
            bits % self.cell_bits == 0,
            f"cell_bits={self.cell_bits} must divide the {bits} bits of a magnitude; choose 5 or 9 bits for a weight "
            "on cells of 4.",
        )
        return bits // self.cell_bits


@dataclass(frozen=True)
class Conductances:
    """A layer on crossbars: `plus` and `minus` [slices, O, I, …] in siemens, 0 where no cell is; and their scale.

    W = scale * sum_s 2^(s cell_bits) (plus_s - minus_s).
    """

    plus: Tensor
    minus: Tensor
    scale: Tensor
    cell_bits: int

    @property
    def weight(self) -> Tensor:
        """The weight that the crossbars compute with."""
        places = 2.0 ** (self.cell_bits * torch.arange(len(self.plus), dtype=self.plus.dtype))
        signed = self.plus - self.minus
        return self.scale * (places.reshape(-1, *(1,) * (signed.ndim - 1)) * signed).sum(0)

    def varied(self, sigma: float, generator: torch.Generator) -> Conductances:
        """Every cell off by a factor exp(sigma N(0, 1)) of its own."""
        plus, minus = (
            each * torch.exp(sigma * torch.randn(each.shape, generator=generator, dtype=each.dtype))
            for each in (self.plus, self.minus)
        )
        return Conductances(plus, minus, self.scale, self.cell_bits)


def conductances(weight: Tensor, levels: Levels, device: Device) -> Conductances:
    """Quantised weights [O, I, …] in float64, exactly: `weight` must lie on the levels."""
    weight = weight.detach().double()
    alpha, numbers = levels.assign(weight)
    base, count = 2**device.cell_bits, device.slices(levels)
    digits = torch.stack([(numbers // base**s) % base for s in range(count)])
    least = device.largest / levels.ratio
    cells = least + (device.largest - least) * digits / (base - 1)
    # At the largest number every digit is the largest: sum base^s largest there is a weight of alpha.
    scale = alpha / (device.largest * sum(base**s for s in range(count)))
    zero = torch.zeros_like(cells)
    return Conductances(cells.where(weight > 0, zero), cells.where(weight < 0, zero), scale, device.cell_bits)


@dataclass(frozen=True)
class Constants:
    """What power and area are computed with; where the numbers come from belongs to every figure made with them.

    Volts, and watts of one converter. Areas need no constants: all crossbars have the same.
    """

    source: str
    volts: float
    adc_watts: float
    dac_watts: float


@dataclass(frozen=True)
class CrossbarCost:
    """What the layers of a network take on crossbars, with all weights at `dense_bits`, and as they are."""

    dense_crossbars: int
    crossbars: int
    power_ratio: float | None = None

    @property
    def area_ratio(self) -> float:
        """That of the numbers of crossbars, all of which have the same area, converters included."""
        return self.crossbars / self.dense_crossbars


def crossbar_cost(
    model: nn.Module,
    levels: Levels,
    device: Device,
    constants: Constants | None = None,
    dense_bits: int = 9,
    unpruned: nn.Module | None = None,
) -> CrossbarCost:
    """Crossbars of all convolutions and linear layers of `model`, whose weights must lie on the levels.

    Counts are exact; power and area are ratios to the dense mapping at `dense_bits`, under the `constants` given. The
    published savings have that same base, of four crossbars a tile at 9 bits: 5 bits alone halve it. IR drop and
    read noise are in no figure. The power of the dense mapping's devices is that of the weights of `unpruned`, the
    network before pruning; without it, weights that were pruned draw none there either, and the saving is understated.
    """
    before, after = Levels(dense_bits, levels.ratio), levels
    dense = left = 0
    power = [0.0, 0.0]
    first = Masks().layers(model if unpruned is None else unpruned)
    for name, layer in Masks().layers(model).items():
        weight: Any = layer.weight
        original: Any = first[name].weight
        tiles = tiles_of(weight, device.rows, device.columns)
        dense += 2 * device.slices(before) * tiles.dense
        left += 2 * device.slices(after) * tiles.left
        if constants is not None:
            for place, (grid, held) in enumerate(((before, original), (after, weight))):
                on = conductances(grid.project(held.detach().double()), grid, device)
                power[place] += constants.volts**2 * float((on.plus + on.minus).sum())
    if constants is None:
        return CrossbarCost(dense, left)
    converters = device.columns * constants.adc_watts + device.rows * constants.dac_watts
    watts = [power[0] + dense * converters, power[1] + left * converters]
    return CrossbarCost(dense, left, watts[1] / watts[0])


def under_variation(
    model: nn.Module,
    levels: Levels,
    device: Device,
    sigma: float,
    measure: Callable[[nn.Module], float],
    generator: torch.Generator,
    draws: int = 20,
) -> tuple[float, float]:
    """Mean and 5th percentile of `measure` over `draws` networks with every cell off by its own lognormal factor."""
    require(draws >= 20, f"draws={draws} must be at least 20 for a 5th percentile.")
    found = []
    for _ in range(draws):
        twin = copy.deepcopy(model)
        for layer in Masks().layers(twin).values():
            weight: Any = layer.weight
            varied = conductances(weight, levels, device).varied(sigma, generator).weight
            with torch.no_grad():
                weight.copy_(varied)
        found.append(measure(twin))
    values = sorted(found)
    return sum(values) / draws, values[ceil(0.05 * draws) - 1]
