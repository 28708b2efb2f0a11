"""SmartDeal: weights as sparse powers of two times a tiny dense basis (Chen et al., 2021; SmartExchange, ISCA 2020)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil, log2
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trivet.compression.compression import Compression, Moment, WeightMap, originals, steps_on
from trivet.compression.m_bit import MBit
from trivet.errors import require
from trivet.methods import method
from trivet.models.baking import bake

S = 3
"""Columns of a block, and the side of its basis."""
ROWS = 64 * S
"""Rows of a block at most."""


@dataclass(frozen=True)
class Slicing:
    """How a weight [O, …] is cut into blocks [N, rows, S], and put together again.

    Kernels three wide: each filter's (I kh) x 3 rows. All others: each output's weights in rows of three, the last
    filled up with zeros. The rows of an output are dealt to as few equal blocks as have at most 192.
    """

    shape: torch.Size
    rows: int
    parts: int

    @classmethod
    def of(cls, shape: torch.Size) -> Slicing:
        length = ceil(shape[1:].numel() / S)
        parts = ceil(length / ROWS)
        return cls(shape, ceil(length / parts), parts)

    def cut(self, weight: Tensor) -> Tensor:
        flat = weight.reshape(self.shape[0], -1)
        padded = F.pad(flat, (0, self.parts * self.rows * S - flat.shape[1]))
        return padded.reshape(-1, self.rows, S)

    def join(self, blocks: Tensor) -> Tensor:
        return blocks.reshape(self.shape[0], -1)[:, : self.shape[1:].numel()].reshape(self.shape)


def nearest_power(size: Tensor) -> Tensor:
    """The power of two nearest to each positive number, in linear distance, ties downwards; 0 stays 0."""
    _, exponent = torch.frexp(size)
    lower = torch.ldexp(torch.ones_like(size), exponent - 1)  # the largest power not above it
    return torch.where(size > 1.5 * lower, 2 * lower, lower) * (size > 0)


def powers(coefficients: Tensor, top: Tensor | float, bits: int) -> Tensor:
    """Coefficients on {0} and ±{the 2^(bits - 1) - 1 powers of two up to `top`}: the nearest, ties downwards."""
    size, least = coefficients.abs(), top * 2.0 ** (2 - 2 ** (bits - 1))
    nearest = nearest_power(size).clamp_max(top)
    small = torch.where(size > least / 2, least, torch.zeros_like(size))
    return coefficients.sign() * torch.where(nearest < least, small, nearest)


@dataclass(frozen=True)
class Decomposition:
    """Blocks A [N, rows, 3] near Q B: Q [N, rows, 3] sparse signed powers of two, B [N, 3, 3]."""

    coefficients: Tensor
    basis: Tensor

    @property
    def rebuilt(self) -> Tensor:
        return self.coefficients @ self.basis


@torch.no_grad()
def decompose(blocks: Tensor, threshold: Tensor | float, bits: int, rounds: int = 30) -> Decomposition:
    """Alternate between the basis and the coefficients of every block at once, in float64.

        B = I, Ce = A;  repeat:  Q = powers of two nearest to Ce;  stop if Q is unchanged;
            B = argmin ||A - Q B||;  Ce = argmin ||A - Ce B||;  Ce = 0 where |Ce| < threshold

    `threshold` is a number, or [N, 1, 1]. All blocks share one window of powers, with the largest coefficient of the
    first round on top. The alternation is not monotone; each basis is the least-squares optimum of its coefficients.
    """
    a = blocks.double()
    ce, q = a.clone(), torch.zeros_like(a)
    top = nearest_power(a.abs().max())
    basis = torch.eye(S, dtype=a.dtype, device=a.device).expand(len(a), S, S).clone()
    for _ in range(rounds - 1):
        fresh = powers(ce, top, bits)
        moving = (fresh != q).flatten(1).any(1)
        q = fresh
        if not bool(moving.any()):
            break
        basis[moving] = _least_squares(q[moving], a[moving])
        solved = a[moving] @ torch.linalg.pinv(basis[moving])
        limit = threshold[moving].double() if isinstance(threshold, Tensor) else threshold
        ce[moving] = torch.where(solved.abs() < limit, torch.zeros_like(solved), solved)
    q = powers(ce, top, bits)
    return Decomposition(q.to(blocks.dtype), _least_squares(q, a).to(blocks.dtype))


def _least_squares(q: Tensor, a: Tensor) -> Tensor:
    """argmin_B ||A - Q B||_F, of least norm where Q has not full rank."""
    return torch.linalg.pinv(q) @ a


@dataclass(frozen=True)
class Coding:
    """How a layer's weights are stored: the settings of a `SmartDeal`."""

    threshold: float
    bits: int
    basis_bits: int

    def rounded(self, basis: Tensor) -> Tensor:
        """The bases [N, 3, 3] of a layer on their common grid, even and through zero."""
        return basis if self.basis_bits == 32 else MBit(self.basis_bits, rule="author").project(basis)

    def of(self, weight: Tensor, slicing: Slicing) -> Decomposition:
        """The blocks of a weight, each with its threshold relative to the root mean square of its entries."""
        blocks = slicing.cut(weight.detach())
        size = blocks.double().square().mean((1, 2), keepdim=True).sqrt()
        found = decompose(blocks, self.threshold * size, self.bits)
        return Decomposition(found.coefficients, self.rounded(found.basis))


class Rebuilt(WeightMap):
    """Q B, joined: what is stored are the coefficients [N, rows, 3] and the basis [N, 3, 3]."""

    factors = True

    def __init__(self, slicing: Slicing, coding: Coding) -> None:
        super().__init__()
        self.slicing, self.coding = slicing, coding

    def forward(self, coefficients: Tensor, basis: Tensor) -> Tensor:
        return self.slicing.join(coefficients @ basis)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        found = self.coding.of(weight, self.slicing)
        return found.coefficients, found.basis


class Trained(WeightMap):
    """The weight itself, while the network trains between decompositions."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight


@method(title="SmartDeal", paper="Chen et al., 2021", year=2021, legs="small")
@dataclass(frozen=True, kw_only=True)
class SmartDeal(Compression):
    """Every weight matrix becomes (sparse signed powers of two) x (3 x 3 basis), by decomposing after every epoch.

        train an epoch; W <- Q B, the decomposition of W; … ; train an epoch; Q and B of W are what is stored

    Multiplying by powers of two is shifting, so that weights can be rebuilt beside the arithmetic unit from few bits;
    on this machine that saves bytes, not time. Layers whose rows are shorter than three columns are left alone, as are
    those whose blocks would have no more rows than the basis.

    Promises nothing; energy figures are estimates (`compression.energy`). The authors report 2.44x energy efficiency
    of inference on their accelerator.

    Attributes:
        threshold: coefficients below this share of their block's root mean square are zero. The authors' threshold is
            absolute (1e-3 and 4e-3), which is another one in every layer.
        bits: of a coefficient: its sign, and one of 2^(bits - 1) - 1 powers of two, or zero.
        basis_bits: of an entry of a basis: 8, as the authors' hardware has it, or 32, as their code does. With blocks
            of few rows the bases are a large part of what is stored.
    """

    threshold: float = 0.05
    bits: int = 4
    basis_bits: Literal[8, 32] = 8

    def __post_init__(self) -> None:
        require(self.threshold >= 0, f"threshold={self.threshold} must not be negative.")
        require(2 <= self.bits <= 8, f"bits={self.bits} must lie between 2 and 8.")
        require(self.basis_bits in (8, 32), f"basis_bits={self.basis_bits} must be 8 or 32.")

    @property
    def coding(self) -> Coding:
        return Coding(self.threshold, self.bits, self.basis_bits)

    def layers(self, model: nn.Module) -> dict[str, nn.Module]:
        chosen = {name: layer for name, layer in super().layers(model).items() if _worth(layer)}
        require(bool(chosen), "no layer has blocks of more than three rows; SmartDeal would only make them larger.")
        return chosen

    def map_for(self, name: str, layer: nn.Module) -> WeightMap:
        return Trained()

    def attach(self, model: nn.Module) -> None:
        for name, layer in self.layers(model).items():
            require(
                not steps_on(layer),
                f"the weight of {name} is compressed already, and factors would not keep that; add it to exclude.",
            )
        super().attach(model)

    @torch.no_grad()
    def before(self, model: nn.Module, moment: Moment) -> None:
        # As an epoch begins, not as one ends: the last weights are decomposed by `end`, and what is made of factors
        # already must not be decomposed again, for the alternation would find other factors, and other weights.
        if moment.starts_epoch and moment.epoch > 0:
            self._decompose(model)

    def _decompose(self, model: nn.Module) -> None:
        for weight in self._weights(model):
            weight.copy_(self._rebuilt(weight))

    def _rebuilt(self, weight: Tensor) -> Tensor:
        slicing = Slicing.of(weight.shape)
        return slicing.join(self.coding.of(weight, slicing).rebuilt)

    def _weights(self, model: nn.Module) -> list[Tensor]:
        return [originals(layer)[0] for layer in self.layers(model).values()]

    @contextmanager
    def as_shipped(self, model: nn.Module) -> Iterator[None]:
        weights = self._weights(model)
        kept = [weight.detach().clone() for weight in weights]
        with torch.no_grad():
            self._decompose(model)
        try:
            yield
        finally:
            with torch.no_grad():
                for weight, before in zip(weights, kept, strict=True):
                    weight.copy_(before)

    @torch.no_grad()
    def report(self, model: nn.Module) -> dict[str, Any]:
        """|| W - Q B || / || W || of each layer, by the decomposition that ends the stage."""
        weights = zip(self.layers(model), self._weights(model), strict=True)
        return {"decomposition_error": {n: float((w - self._rebuilt(w)).norm() / w.norm()) for n, w in weights}}

    def end(self, model: nn.Module) -> Compression:
        layers = self.layers(model)
        for layer in layers.values():
            bake(layer)
        stored = self._stored(layers)
        stored.attach(model)
        return stored

    def _stored(self, layers: Iterable[str]) -> SmartDealFactors:
        return SmartDealFactors(
            threshold=self.threshold, bits=self.bits, basis_bits=self.basis_bits, include=tuple(layers)
        )


@method(title="SmartDeal's factors", paper="Chen et al., 2021", year=2021, legs="small")
@dataclass(frozen=True, kw_only=True)
class SmartDealFactors(SmartDeal):
    """A network stored as SmartDeal's coefficients and bases. Where it is trained on, bases of 32 bits learn."""

    def map_for(self, name: str, layer: nn.Module) -> WeightMap:
        weight: Any = layer.weight
        return Rebuilt(Slicing.of(weight.shape), self.coding)

    def attach(self, model: nn.Module) -> None:
        super().attach(model)
        for layer in self.layers(model).values():
            freeze(layer, self.coding)

    def before(self, model: nn.Module, moment: Moment) -> None:
        """Nothing: the coefficients are what they are."""

    def report(self, model: nn.Module) -> dict[str, Any]:
        return {}

    @contextmanager
    def as_shipped(self, model: nn.Module) -> Iterator[None]:
        yield

    def end(self, model: nn.Module) -> Compression:
        return self


def freeze(layer: nn.Module, coding: Coding) -> None:
    """Of a layer's factors, let only bases learn that are on no grid."""
    coefficients, basis = originals(layer)
    coefficients.requires_grad_(False)
    basis.requires_grad_(coding.basis_bits == 32)


def _worth(layer: nn.Module) -> bool:
    weight: Any = layer.weight
    slicing = Slicing.of(weight.shape)
    return slicing.rows > S


def storage_bits(coefficients: Tensor, basis: Tensor, basis_bits: int = 32) -> int:
    """Bits of factors: non-zeros at ceil(log2(distinct magnitudes)) + 1 each, a bit of map for every entry, the basis.

    It leaves out the list of the values that 8 bits stand for, which the packed file holds, up to 1 KB for a layer.
    """
    magnitudes = coefficients.abs().unique()
    kinds = int((magnitudes > 0).sum())
    each = ceil(log2(kinds)) + 1 if kinds else 0
    return int(coefficients.count_nonzero()) * each + coefficients.numel() + basis.numel() * basis_bits
