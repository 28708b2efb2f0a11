"""Linear bounds of small rectifier networks over thousands of boxes at once, for branch and bound on the inputs.

CROWN (Zhang et al., NeurIPS 2018) as in `trivet.certify.bounds`, for chains of dense layers, arranged for speed: a
backward pass carries one row for each neuron that is unstable in its box, and none for the others; boxes inherit the
intervals of the box they were cut from; inside the network both ends of an interval come from one pass, because the
two lines of a rectifier are chosen parallel (Fast-Lin, Weng et al., ICML 2018; as zonotopes: DeepZ, Singh et al.,
NeurIPS 2018), and only the last pass, of the specification, takes the adaptive slopes.

All in float64 with error terms: `e_k` bounds, for every neuron of layer k, what rounding does there, in the network's
evaluation if `arithmetic` is "float32", and in ours. Whatever a pass adds up, its errors are sums of |coefficient|
times such a term, since every number in it is a coefficient times a value no larger than the neuron's (Higham 2002,
section 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from trivet.certify.bounds.activations import Rectifier
from trivet.certify.bounds.layer import Affine
from trivet.certify.bounds.network import Network
from trivet.certify.bounds.rounding import LARGEST, Arithmetic, Rounding, gamma
from trivet.certify.bounds.steps import Reader

MAX_WEIGHTS = 1 << 24
_TINY = 1e-290
"""Added to every error, for products below the range of float64."""


@dataclass(frozen=True, eq=False)
class Dense:
    """z = h W^T + b, and the next h is z, or max(z, 0) where `rectified`.

    Attributes:
        weight: [out, in] float64, exactly the network's.
        bias: [out] float64.
        operations: most roundings behind one output in the network's own evaluation.
    """

    weight: Tensor
    bias: Tensor
    rectified: bool
    operations: int


@dataclass(frozen=True, eq=False)
class Linear:
    """Lower bounds over boxes, one for each of M pairs of a box and a row: value >= <slope, x> + constant in the box.

    Attributes:
        box: [M] int64.
        slope: [M, n].
        constant: [M], with all errors taken off.
        least: [M], the least value in the box; minus infinity where it is no number.
        trail: coefficients [M, out] of every rectified layer's outputs on the way, from the last to the first.
    """

    box: Tensor
    slope: Tensor
    constant: Tensor
    least: Tensor
    trail: Sequence[Tensor]


@dataclass(frozen=True, eq=False)
class _Lines:
    """d z <= h <= d z + offset, and a z <= h for the adaptive slope; `loss` is offset / 2 with the layer's errors."""

    chord: Tensor
    adaptive: Tensor
    half_offset: Tensor
    loss: Tensor


@dataclass(frozen=True, eq=False)
class DenseNetwork:
    """A chain of dense layers with rectifiers between them. The last layer is not rectified.

    Attributes:
        layers: at least one.
        arithmetic: what bounds hold for, "real" or "float32", as in `Network.margins`.
    """

    layers: tuple[Dense, ...]
    arithmetic: Arithmetic

    @classmethod
    def of(cls, network: Network, arithmetic: Arithmetic) -> DenseNetwork | None:
        """The same network with its affine layers written out as matrices; None if it is no such chain, or too large.

        Layers that only move numbers are merged into the layer after them, which is exact; others are kept apart.
        """
        if any(step.inputs != (node,) for node, step in enumerate(network.steps)):
            return None
        dense: list[Dense] = []
        moved: Tensor | None = None
        size = network.shapes[0].numel()
        for step, before, after in zip(network.steps, network.shapes[:-1], network.shapes[1:], strict=True):
            layer = step.make(Reader(torch.float64, exact=True))
            if isinstance(layer, Rectifier) and layer.leak == 0 and moved is None and dense and not dense[-1].rectified:
                dense[-1] = Dense(dense[-1].weight, dense[-1].bias, True, dense[-1].operations)
                continue
            if not isinstance(layer, Affine) or before.numel() * after.numel() > MAX_WEIGHTS:
                return None
            columns = layer.linear(torch.eye(before.numel(), dtype=torch.float64).view(-1, *before)).flatten(1)
            weight = columns.T if moved is None else columns.T @ moved
            shift = layer.constant()
            bias = columns.new_zeros(after.numel()) if shift is None else shift.expand(after).flatten()
            if not layer.operations and shift is None:
                moved = weight
                continue
            moved = None
            identity = weight.shape[0] == weight.shape[1] and bool((weight == torch.eye(len(weight))).all())
            if not (identity and not bias.any()):  # x - 0 is exact in any arithmetic
                dense.append(Dense(weight.contiguous(), bias, False, layer.operations))
        if moved is not None or not dense or dense[-1].rectified:
            width = size if not dense else len(dense[-1].bias)
            weight = torch.eye(width, dtype=torch.float64) if moved is None else moved
            dense.append(Dense(weight, weight.new_zeros(len(weight)), False, 0))
        return cls(tuple(dense), arithmetic)

    def __call__(self, x: Tensor) -> Tensor:
        """The outputs [B, m] in float64, for inputs [B, n]."""
        for layer in self.layers:
            x = x @ layer.weight.T + layer.bias
            x = x.relu() if layer.rectified else x
        return x

    def exactly(self, x: Tensor) -> list[Fraction]:
        """The outputs for one input [n] as the network's function of real numbers, without any rounding."""
        h, scale = _integers(x.double())
        for layer in self.layers:
            (weight, by), (bias, and_by) = _integers(layer.weight), _integers(layer.bias)
            h = weight.dot(h) * and_by + bias * (by * scale)
            h = np.maximum(h, 0) if layer.rectified else h
            scale *= by * and_by
        return [Fraction(int(value), scale) for value in h]

    @property
    def widths(self) -> list[int]:
        """Of every layer but the last: how the intervals of the boxes are laid side by side."""
        return [len(layer.bias) for layer in self.layers[:-1]]

    def intervals(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Of all pre-activations but the last layer's, by intervals alone, [B, 2, sum of widths]: where to begin."""
        found = []
        for k, layer in enumerate(self.layers[:-1]):
            below, above = self._affine(k, lower, upper)
            found.append(torch.stack([below, above], 1))
            lower, upper = (below.relu(), above.relu()) if layer.rectified else (below, above)
        return torch.cat(found, 2) if found else lower.new_zeros(len(lower), 2, 0)

    def bound(self, lower: Tensor, upper: Tensor, known: Tensor, box: Tensor, rows: Tensor) -> Linear:
        """Lower bounds of <row, outputs> + its last entry, and `known` tightened in place.

        Args:
            lower: [B, n].
            upper: [B, n].
            known: [B, 2, sum of widths], true intervals of the pre-activations in each box.
            box: [M] int64, the box of each row.
            rows: [M, m + 1].
        """
        where = _Where.of(lower, upper, self._unit)
        parts = known.split(self.widths, 2)
        lines: list[_Lines] = []
        sizes = where.size
        errors = [self._error(0, sizes)]
        for k, layer in enumerate(self.layers[:-1]):
            below, above = parts[k].unbind(1)
            if k == 0:
                low, high = self._affine(0, lower, upper)
                torch.maximum(below, low, out=below)
                torch.minimum(above, high, out=above)
            elif layer.rectified:
                inside, neuron = ((below < 0) & (above > 0)).nonzero(as_tuple=True)
                if len(inside):
                    low, high = self._both(k, where, inside, neuron, lines, errors)
                    below[inside, neuron] = torch.maximum(below[inside, neuron], low)
                    above[inside, neuron] = torch.minimum(above[inside, neuron], high)
            size = torch.maximum(below.abs(), above.abs())
            errors[k] = errors[k] + self._unit * size
            lines.append(_lines(below, above, errors[k], layer.rectified))
            sizes = above.relu() if layer.rectified else size
            errors.append(self._error(k + 1, sizes))
        last = self.layers[-1]
        coefficients, constants = rows[:, :-1], rows[:, -1]
        slope, constant, _, trail = self._pull(
            coefficients @ last.weight, len(self.layers) - 2, box, lines, adaptive=True
        )
        # The last layer's own errors, and those of taking the rows to it and of writing down their constants.
        reach = sizes @ last.weight.abs().T + last.bias.abs()
        error = (coefficients.abs() * (errors[-1] + self._unit * reach)[box]).sum(1) + self._unit * constants.abs()
        constant = constant + coefficients @ last.bias + constants - error
        least = constant + where.least(slope, box)
        return Linear(box, slope, constant, least.nan_to_num(-torch.inf, -torch.inf, -torch.inf), trail)

    def importance(self, width: Tensor, known: Tensor, found: Linear) -> Tensor:
        """[B, n]: how much cutting each input in two should tighten the bounds `found` over boxes of that `width`.

        A neuron's relaxation costs |coefficient| times the offset of its upper line, and the offset is about
        proportional to the neuron's interval, to which each input contributes |slope of the neuron| times its width.
        """
        score = torch.zeros_like(width)
        slope: Tensor | None = None
        trail = list(reversed(found.trail))
        for layer, part in zip(self.layers[:-1], known.split(self.widths, 2), strict=True):
            slope = layer.weight.expand(len(width), -1, -1) if slope is None else layer.weight @ slope
            if not layer.rectified:
                continue
            below, above = part.unbind(1)
            weight = torch.zeros_like(below).index_add_(0, found.box, trail.pop(0).abs())
            weight = weight * ((below < 0) & (above > 0))
            score += (weight[:, None] @ slope.abs()).squeeze(1)
            chord = above.relu() / (above.relu() - below.clamp(max=0.0)).clamp(min=_TINY)
            slope = chord[:, :, None] * slope
        return score * width

    @property
    def _unit(self) -> float:
        """Covers everything that one pass adds up, and its own computation, several times over."""
        terms = sum(len(layer.bias) + layer.weight.shape[1] for layer in self.layers)
        return gamma(16 * (terms + 64), Rounding.of("real", torch.float64).ours)

    def _error(self, k: int, sizes: Tensor) -> Tensor:
        """[B, out]: what rounding may do to z_k where the inputs of layer k are no larger than `sizes`."""
        layer = self.layers[k]
        network = gamma(layer.operations, Rounding.of(self.arithmetic, torch.float64).network)
        reach = sizes @ layer.weight.abs().T + layer.bias.abs()
        error = (network * (1 + 1e-9) + self._unit) * reach + _TINY
        if network:  # of subnormal results, and beyond the range of float32 nothing is known
            error = error + layer.operations * Rounding.of(self.arithmetic, torch.float64).least(1)
            error = error.where(reach < LARGEST, torch.inf)
        return error

    def _affine(self, k: int, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Layer k of intervals."""
        layer = self.layers[k]
        middle = (lower + upper) / 2 @ layer.weight.T + layer.bias
        radius = (upper - lower) / 2 @ layer.weight.abs().T
        radius = radius + self._error(k, torch.maximum(lower.abs(), upper.abs()))
        return middle - radius, middle + radius

    def _both(
        self,
        k: int,
        where: _Where,
        box: Tensor,
        neuron: Tensor,
        lines: Sequence[_Lines],
        errors: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Both ends of some pre-activations of layer k."""
        layer = self.layers[k]
        slope, constant, spread, _ = self._pull(layer.weight[neuron], k - 1, box, lines, adaptive=False)
        constant = constant + layer.bias[neuron]
        spread = spread + errors[k][box, neuron]
        centre = (slope * where.middle[box]).sum(1) + constant
        spread = spread + (slope.abs() * where.radius[box]).sum(1)
        return centre - spread, centre + spread

    def _pull(
        self, rows: Tensor, k: int, box: Tensor, lines: Sequence[_Lines], *, adaptive: bool
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """<rows, h_k> as (slope, constant, spread) in the inputs: up to the spread if not `adaptive`.

        If `adaptive`, the spread is taken off the constant, which makes a lower bound.
        """
        constant = rows.new_zeros(len(rows))
        spread = rows.new_zeros(len(rows))
        trail = []
        for at in range(k, -1, -1):
            line, layer = lines[at], self.layers[at]
            sizes = rows.abs()
            spread += (sizes * line.loss[box]).sum(1)
            if layer.rectified:
                trail.append(rows)
                constant += (rows * line.half_offset[box]).sum(1)
                if adaptive:
                    mean, gap = (line.adaptive + line.chord) / 2, (line.adaptive - line.chord) / 2
                    rows = torch.addcmul(rows * mean[box], sizes, gap[box])
                else:
                    rows = rows * line.chord[box]
            constant += rows @ layer.bias
            rows = rows @ layer.weight
        return rows, constant - spread if adaptive else constant, spread, trail


@dataclass(frozen=True, eq=False)
class _Where:
    """Boxes as centre and radius, rounded outward; [B, n] each."""

    middle: Tensor
    radius: Tensor
    size: Tensor

    @classmethod
    def of(cls, lower: Tensor, upper: Tensor, unit: float) -> _Where:
        size = torch.maximum(lower.abs(), upper.abs())
        return cls((lower + upper) / 2, (upper - lower) / 2 + unit * size + _TINY, size)

    def least(self, slope: Tensor, box: Tensor) -> Tensor:
        return (slope * self.middle[box]).sum(1) - (slope.abs() * self.radius[box]).sum(1)


def _lines(lower: Tensor, upper: Tensor, error: Tensor, rectified: bool) -> _Lines:
    """The relaxation of max(z, 0) over [lower, upper]; of z itself if not `rectified`, with errors alone."""
    if not rectified:
        none = torch.zeros_like(lower)
        return _Lines(none, none, none, error)
    below, above = lower.clamp(max=0.0), upper.clamp(min=0.0)
    chord = above / (above - below).clamp(min=_TINY)
    chord = chord.where(lower < 0, 1.0).where(upper > 0, 0.0)
    unstable = (lower < 0) & (upper > 0)
    # What both ends need of a line with a rounded slope, and a little more; no line holds where an end is unknown.
    offset = torch.maximum(-chord * below, (1 - chord) * above) * (1 + 1e-14)
    offset = offset.where(unstable, 0.0)
    adaptive = (chord > 0.5).to(chord.dtype).where(unstable, chord)
    return _Lines(chord, adaptive, offset / 2, offset / 2 + error)


def _integers(values: Tensor) -> tuple[np.ndarray, int]:
    """Floats as integers over one power of two."""
    ratios = [value.as_integer_ratio() for value in values.flatten().tolist()]
    scale = max(below for _, below in ratios)
    return np.array([above * (scale // below) for above, below in ratios], object).reshape(values.shape), scale
