"""Layers that move, scale or add values, but do not mix those of one tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trivet.certify.bounds.interval import Diagonal
from trivet.certify.bounds.layer import Affine


@dataclass(frozen=True, eq=False)
class Scale(Affine):
    """factor * x + shift, value by value: constants, normalisation, BatchNorm by its running statistics.

    Attributes:
        factor: of a shape that broadcasts with one record.
        shift: likewise; None for nothing.
        shift_size: at least the absolute values of the terms of which `shift` is the sum.
        rounded: operations in which a network may compute this.
    """

    factor: Tensor
    shift: Tensor | None = None
    shift_size: Tensor | None = None
    rounded: int = 2

    @property
    def operations(self) -> int:
        return self.rounded

    def linear(self, *inputs: Tensor) -> Tensor:
        return inputs[0] * self.factor

    def spread(self, *inputs: Tensor) -> Tensor:
        return inputs[0] * self.factor.abs()

    def constant(self) -> Tensor | None:
        return self.shift

    def constant_size(self) -> Tensor | None:
        return super().constant_size() if self.shift_size is None else self.shift_size

    def transposed(self, rows: Tensor, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
        return (rows * self.factor,)

    def diagonal(self, before: Diagonal, error: float, size: Tensor | None) -> Diagonal | None:
        moved = self.spread(before.error)
        if size is not None:
            moved = moved * (1 + error) + error * self.error_size(size)
        return Diagonal(self(before.centre), self.spread(before.gain), moved, before.eps, before.norm)


@dataclass(frozen=True, eq=False)
class Moving(Affine):
    """Reshaping, permuting, slicing, padding with zeros: numbers change places, none is computed."""

    move: Callable[[Tensor], Tensor]

    def linear(self, *inputs: Tensor) -> Tensor:
        return self.move(inputs[0])

    def diagonal(self, before: Diagonal, error: float, size: Tensor | None) -> Diagonal | None:
        centre, gain, moved = (self.move(each) for each in (before.centre, before.gain, before.error))
        return Diagonal(centre, gain, moved, before.eps, before.norm)


@dataclass(frozen=True, eq=False)
class Reshaping(Moving):
    """Records in another shape, with their numbers in the same order."""

    def transposed(self, rows: Tensor, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
        return (rows.reshape(len(rows), *shapes[0]),)


@dataclass(frozen=True, eq=False)
class Padding(Moving):
    """Padding: `move` pads with 0, and where another number is meant, `filled` is what is added to that.

    `before` says how far a map has moved, in the last axis and in the one before it.
    """

    filled: Tensor | None = None
    before: tuple[int, int] | None = None

    def constant(self) -> Tensor | None:
        return self.filled


@dataclass(frozen=True, eq=False)
class Sum(Affine):
    """The sum of values of one shape, each with its sign."""

    signs: tuple[int, ...]

    @property
    def operations(self) -> int:
        return len(self.signs)

    def linear(self, *inputs: Tensor) -> Tensor:
        total = inputs[0] if self.signs[0] > 0 else -inputs[0]
        for sign, each in zip(self.signs[1:], inputs[1:], strict=True):
            total = total + each if sign > 0 else total - each
        return total

    def spread(self, *inputs: Tensor) -> Tensor:
        total = inputs[0]
        for each in inputs[1:]:
            total = total + each
        return total

    def transposed(self, rows: Tensor, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
        return tuple(rows if sign > 0 else -rows for sign in self.signs)


@dataclass(frozen=True, eq=False)
class Concatenation(Affine):
    """Values side by side along an axis after the first."""

    axis: int

    def linear(self, *inputs: Tensor) -> Tensor:
        return torch.cat(inputs, self.axis)

    def transposed(self, rows: Tensor, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
        return rows.split([shape[self.axis - 1] for shape in shapes], self.axis)
