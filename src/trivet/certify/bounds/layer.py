"""The two things every layer can do with bounds: carry intervals forward, and linear bounds backward."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trivet.certify.bounds.interval import Diagonal, Interval, Norm
from trivet.certify.bounds.rounding import Rounding


@dataclass(frozen=True, eq=False)
class Pulled:
    """<rows, output> >= sum over inputs of <rows', input> + <rows, offset> - <|rows|, slack>.

    Attributes:
        rows: of each input, [B, S, ...].
        constant: [B, S], offset and slack summed up.
    """

    rows: tuple[Tensor, ...]
    constant: Tensor


class Layer(ABC):
    """One step of a network, of one value or several [B, ...] to one."""

    @abstractmethod
    def __call__(self, *inputs: Tensor) -> Tensor:
        """What the step computes."""

    @abstractmethod
    def bounds(self, inputs: Sequence[Interval], rounding: Rounding | None) -> Interval:
        """Where its output lies, if its inputs lie in `inputs`."""

    @abstractmethod
    def pull(
        self,
        rows: Tensor,
        inputs: Sequence[Interval],
        output: Interval,
        slope: str | Tensor,
        rounding: Rounding | None,
        steps: int,
    ) -> Pulled:
        """A lower bound of <rows, output>, linear in the inputs; `rows` are [B, S, ...].

        Args:
            slope: of the lower line of unstable rectifiers, by name, or chosen, [B, S, ...] or [B, 1, ...].
            steps: of the whole pass, for the errors of adding up.
        """


def inner(rows: Tensor, values: Tensor) -> Tensor:
    """<row, value>, [B, S], for rows [B, S, ...] and values [B or 1, ...] or [B, S, ...]."""
    flat = rows.flatten(2)
    if values.ndim == rows.ndim and values.shape[1] == rows.shape[1]:
        return (flat * values.flatten(2)).sum(2)
    return (flat @ values.flatten(1).expand(len(rows), -1)[:, :, None]).squeeze(2)


@dataclass(frozen=True, eq=False)
class Affine(Layer):
    """L x + c. Subclasses say what L is, and what |L| is; the rest follows."""

    @property
    def operations(self) -> int:
        """Most roundings behind one output, counted as products and sums; 0 for layers that only move numbers."""
        return 0

    @abstractmethod
    def linear(self, *inputs: Tensor) -> Tensor:
        """L x."""

    def spread(self, *inputs: Tensor) -> Tensor:
        """|L| x; the same as L x where L has no negative entry."""
        return self.linear(*inputs)

    def constant(self) -> Tensor | None:
        """c, of a shape that broadcasts with one record."""
        return None

    def constant_size(self) -> Tensor | None:
        """The sum of the absolute values of the terms of c: errors are relative to it."""
        c = self.constant()
        return None if c is None else c.abs()

    def transposed(self, rows: Tensor, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
        """L^T rows, for rows [R, ...] and the shapes of one record of each input."""
        zeros = [rows.new_zeros(len(rows), *shape) for shape in shapes]
        pull = torch.func.vjp(self.linear, *zeros)[1]
        pulled: tuple[Tensor, ...] = pull(rows)
        return pulled

    def diagonal(self, before: Diagonal, error: float, size: Tensor | None) -> Diagonal | None:
        """The output, if it still is the inputs one by one; `error` is relative to |L| size + |c|."""
        return None

    def row_norms(self, gain: Tensor, norm: Norm) -> Tensor | None:
        """An upper bound of the dual norm of each row of L diag(gain), where the layer knows one."""
        return None

    def __call__(self, *inputs: Tensor) -> Tensor:
        c = self.constant()
        return self.linear(*inputs) if c is None else self.linear(*inputs) + c

    def error_size(self, *sizes: Tensor) -> Tensor:
        """|L| size + |c|, to which the errors of the step are relative."""
        c = self.constant_size()
        return self.spread(*sizes) if c is None else self.spread(*sizes) + c

    def bounds(self, inputs: Sequence[Interval], rounding: Rounding | None) -> Interval:
        diagonal = inputs[0].diagonal if len(inputs) == 1 else None
        if rounding is None:
            kept = self.diagonal(diagonal, 0.0, None) if diagonal else None
            middle, radius = self(*(each.middle for each in inputs)), self.spread(*(each.radius for each in inputs))
            interval = Interval.around(middle, radius, kept)
        elif not self.operations:
            kept = self.diagonal(diagonal, 0.0, inputs[0].size) if diagonal else None
            return Interval(self(*(each.lower for each in inputs)), self(*(each.upper for each in inputs)), kept)
        else:
            error = rounding.forward(self.operations)
            # One product with |L| for radius and error both: |L| r + e (|L| s + |c|) = |L| (r + e s) + e |c|.
            radius = self.spread(*(each.radius + error * each.size for each in inputs))
            c = self.constant_size()
            radius = (radius if c is None else radius + error * c) + rounding.least(self.operations)
            kept = self.diagonal(diagonal, error, inputs[0].size) if diagonal else None
            middle = self(*(each.middle for each in inputs))
            interval = Interval(middle - radius, middle + radius, kept)
        if diagonal and not kept:
            interval = self._by_dual_norm(diagonal, interval, rounding, inputs[0])
        return interval.checked(rounding)

    def _by_dual_norm(self, ball: Diagonal, box: Interval, rounding: Rounding | None, before: Interval) -> Interval:
        norms = self.row_norms(ball.gain, ball.norm)
        if norms is None:
            return box
        radius = ball.eps.view(-1, *[1] * (norms.ndim - 1)) * norms
        if rounding is not None:
            error = rounding.forward(self.operations)
            c = self.constant_size()
            radius = radius * (1 + error) + self.spread(ball.error + error * before.size)
            radius = (radius if c is None else radius + error * c) + rounding.least(self.operations)
        centre = self(ball.centre)
        return box.intersect(Interval(centre - radius, centre + radius))

    def pull(
        self,
        rows: Tensor,
        inputs: Sequence[Interval],
        output: Interval,
        slope: str | Tensor,
        rounding: Rounding | None,
        steps: int,
    ) -> Pulled:
        shapes = [each.shape[1:] for each in inputs]
        pulled = self.transposed(rows.flatten(0, 1), shapes)
        new = tuple(each.unflatten(0, rows.shape[:2]) for each in pulled)
        c = self.constant()
        constant = rows.new_zeros(rows.shape[:2]) if c is None else inner(rows, c.expand(rows.shape[2:])[None])
        if rounding is not None:
            constant = constant - inner(rows.abs(), self.slack(inputs, rounding, rows[0, 0].numel() + 4 * steps))
        return Pulled(new, constant)

    def slack(self, inputs: Sequence[Interval], rounding: Rounding, count: int) -> Tensor:
        """Errors of a step backward for coefficients of size 1, [B, ...]; the pass adds up `count` numbers."""
        error = rounding.backward(self.operations, count)
        return error * self.error_size(*(each.size for each in inputs)) + rounding.least(self.operations + count)
