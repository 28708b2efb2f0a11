"""Linear bounds of small rectifier networks over thousands of boxes at once, for branch and bound on the inputs.

CROWN (Zhang et al., NeurIPS 2018) as in `trivet.certify.bounds`, for chains of dense layers, arranged for speed. The
intervals of all neurons come from one pass forward, in which every layer is a zonotope (DeepZ, Singh et al., NeurIPS
2018: both lines of a rectifier parallel) with one generator for each input and each unstable neuron, so that small
boxes cost little. They are intersected with those of the box that a box was cut from, and with plain intervals. Only
the specification is taken backward, with the adaptive slopes, and may stop at any layer.

All in float64 with error terms: `_error` bounds, for every neuron of a layer, what rounding does there, in the
network's evaluation if `arithmetic` is "float32", and in ours. Whatever a pass adds up, its errors are sums of
|coefficient| times such a term, since every number in it is a coefficient times a value no larger than the neuron's
(Higham 2002, section 3.1); `_unit` allows many times the operations there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
        weight: [out, in] float64, exactly the network's, but for BatchNorm's factors.
        bias: [out] float64.
        bias_size: [out], at least the sum of the sizes of the terms of which the bias was added up, as for BatchNorm.
        operations: most roundings behind one output in the network's own evaluation.
    """

    weight: Tensor
    bias: Tensor
    bias_size: Tensor
    rectified: bool
    operations: int


@dataclass(frozen=True, eq=False)
class Linear:
    """Lower bounds over boxes, one for each of M pairs of a box and a row: value >= <slope, x> + constant in the box.

    Attributes:
        box: [M] int64.
        slope: [M, n].
        constant: [M], with all errors taken off.
        least: [M], at most the least value in the box, and perhaps better than that of the line; minus infinity where
            it is no number.
        trail: coefficients [M, out] of every rectified layer's outputs on the way, from the last to the first.
        reach: how far each input moves the rectified layers' neurons, [B, n, out], from the first to the last.
    """

    box: Tensor
    slope: Tensor
    constant: Tensor
    least: Tensor
    trail: Sequence[Tensor]
    reach: Sequence[Tensor]


@dataclass(frozen=True, eq=False)
class _Lines:
    """d z <= h <= d z + offset, and a z <= h for the adaptive slope; `loss` is offset / 2 with the layer's errors.

    `middle` and `radius` are the interval of h, that of both ends apart, again with the layer's errors.
    """

    chord: Tensor
    adaptive: Tensor
    half_offset: Tensor
    loss: Tensor
    middle: Tensor
    radius: Tensor


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
                dense[-1] = replace(dense[-1], rectified=True)
                continue
            if not isinstance(layer, Affine) or before.numel() * after.numel() > MAX_WEIGHTS:
                return None
            columns = layer.linear(torch.eye(before.numel(), dtype=torch.float64).view(-1, *before)).flatten(1)
            weight = columns.detach().T if moved is None else columns.detach().T @ moved
            shift = layer.constant()
            bias = columns.new_zeros(after.numel()) if shift is None else shift.detach().expand(after).flatten()
            if not layer.operations and shift is None:
                moved = weight
                continue
            size_of = layer.constant_size()
            bias_size = bias.abs() if size_of is None else size_of.detach().expand(after).flatten()
            moved = None
            identity = weight.shape[0] == weight.shape[1] and bool((weight == torch.eye(len(weight))).all())
            if not (identity and not bias_size.any()):  # x - 0 is exact in any arithmetic
                dense.append(Dense(weight.contiguous(), bias, bias_size, False, layer.operations))
        if moved is not None or not dense or dense[-1].rectified:
            width = size if not dense else len(dense[-1].bias)
            weight = torch.eye(width, dtype=torch.float64) if moved is None else moved
            none = weight.new_zeros(len(weight))
            dense.append(Dense(weight, none, none, False, 0))
        return cls(tuple(dense), arithmetic)

    def __call__(self, x: Tensor) -> Tensor:
        """The outputs [B, m] in float64, for inputs [B, n]."""
        for layer in self.layers:
            x = x @ layer.weight.T + layer.bias
            x = x.relu() if layer.rectified else x
        return x

    def exactly(self, x: Tensor) -> list[Fraction]:
        """The outputs for one input [n] as the layers' function of real numbers, without any rounding."""
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

    @property
    def batch(self) -> int:
        """Boxes in one call, so that its generators take a quarter of a gigabyte at most, or little more."""
        most = (self.layers[0].weight.shape[1] + sum(self.widths)) * max(len(layer.bias) for layer in self.layers)
        return max(1, min(1024, (1 << 25) // most))

    def intervals(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Of all pre-activations but the last layer's, by intervals alone, [B, 2, sum of widths]: where to begin."""
        found = []
        for k, layer in enumerate(self.layers[:-1]):
            error = self._error(k, torch.maximum(lower.abs(), upper.abs()))
            below, above = self._affine(k, lower, upper, error)
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
        lines, sizes, last_error, reach = self._forward(where, lower, upper, known)
        last = self.layers[-1]
        coefficients, constants = rows[:, :-1], rows[:, -1]
        slope, constant, least, trail = self._backward(coefficients @ last.weight, box, lines)
        # The last layer's own errors, and those of taking the rows to it and of writing down their constants.
        largest = sizes @ last.weight.abs().T + last.bias_size
        error = (coefficients.abs() * (last_error + self._unit * largest)[box]).sum(1) + self._unit * constants.abs()
        shift = coefficients @ last.bias + constants - error
        constant = constant + shift
        least = torch.maximum(least + shift, constant + where.least(slope, box))
        least = least.nan_to_num(-torch.inf, -torch.inf, -torch.inf)
        return Linear(box, slope, constant, least, trail, reach)

    def importance(self, width: Tensor, known: Tensor, found: Linear) -> Tensor:
        """[B, n]: how much cutting each input in two should tighten the bounds `found` over boxes of that `width`.

        A neuron's relaxation costs |coefficient| times the offset of its upper line, and the offset is about
        proportional to the neuron's interval, to which each input contributes |slope of the neuron| times its width.
        """
        score = torch.zeros_like(width)
        parts = [
            part for part, layer in zip(known.split(self.widths, 2), self.layers[:-1], strict=True) if layer.rectified
        ]
        for part, rows, reach in zip(parts, reversed(found.trail), found.reach, strict=True):
            below, above = part.unbind(1)
            weight = torch.zeros_like(below).index_add_(0, found.box, rows.abs())
            weight = weight * ((below < 0) & (above > 0))
            score += (reach @ weight[:, :, None]).squeeze(2)
        return score

    @property
    def _unit(self) -> float:
        """Covers everything that one pass adds up, and its own computation, several times over."""
        terms = sum(len(layer.bias) + layer.weight.shape[1] for layer in self.layers)
        return gamma(16 * (terms + 64), Rounding.of("real", torch.float64).ours)

    def _error(self, k: int, sizes: Tensor) -> Tensor:
        """[B, out]: what rounding may do to z_k where the inputs of layer k are no larger than `sizes`."""
        layer = self.layers[k]
        network = gamma(layer.operations, Rounding.of(self.arithmetic, torch.float64).network)
        reach = sizes @ layer.weight.abs().T + layer.bias_size
        error = (network * (1 + 1e-9) + self._unit) * reach + _TINY
        if network:  # of subnormal results, and beyond the range of float32 nothing is known
            error = error + layer.operations * Rounding.of(self.arithmetic, torch.float64).least(1)
            error = error.where(reach < LARGEST, torch.inf)
        return error

    def _affine(self, k: int, lower: Tensor, upper: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        """Layer k of intervals."""
        layer = self.layers[k]
        middle = (lower + upper) / 2 @ layer.weight.T + layer.bias
        radius = (upper - lower) / 2 @ layer.weight.abs().T + error
        return middle - radius, middle + radius

    def _forward(
        self, where: _Where, lower: Tensor, upper: Tensor, known: Tensor
    ) -> tuple[list[_Lines], Tensor, Tensor, list[Tensor]]:
        """Tightens `known` layer by layer, by intervals and by zonotopes.

        A zonotope is a centre [B, out], generators [B, g, out] with coefficients in [-1, 1], one for each input and for
        each unstable neuron before, and a rest [B, out], in which errors are collected. `whole` is at least the sum of
        the sizes of all of these, to which rounding is relative.

        Returns:
            the relaxation of each layer but the last; the sizes of the last layer's inputs, and its errors; and the
            generators of the inputs, [B, n, out], at every rectified layer.
        """
        centre, generators, rest = where.middle, torch.diag_embed(where.radius), torch.zeros_like(where.middle)
        whole, sizes = where.size + where.radius, where.size
        lines, reach = [], []
        for k, (layer, part) in enumerate(zip(self.layers[:-1], known.split(self.widths, 2), strict=True)):
            error = self._error(k, sizes)
            rest = (rest + self._unit * whole) @ layer.weight.abs().T + error
            centre, generators = centre @ layer.weight.T + layer.bias, generators @ layer.weight.T
            spread = generators.abs().sum(1) + rest
            whole = centre.abs() + spread
            spread = spread + self._unit * whole
            low, high = self._affine(k, lower, upper, error)
            below, above = part.unbind(1)
            below.copy_(torch.maximum(below, torch.maximum(low, centre - spread)))
            above.copy_(torch.minimum(above, torch.minimum(high, centre + spread)))
            sizes = torch.maximum(below.abs(), above.abs())
            line = _lines(below, above, error + self._unit * sizes, layer.rectified)
            lines.append(line)
            lower, upper = below, above
            if layer.rectified:
                lower, upper, sizes = below.relu(), above.relu(), above.relu()
                reach.append(generators[:, : len(where.middle[0])].abs())
                centre, rest = line.chord * centre + line.half_offset, line.chord * rest
                whole = line.chord * whole + 2 * line.half_offset
                generators = torch.cat([generators * line.chord[:, None], _generators(line.half_offset)], 1)
        return lines, sizes, self._error(len(self.layers) - 1, sizes), reach

    def _backward(
        self, rows: Tensor, box: Tensor, lines: Sequence[_Lines]
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Lower bounds of <rows, h> for the inputs h of the last layer: linear in the inputs, and the best number.

        Every layer on the way is a place to stop, and to take the least value over its intervals: where relaxations
        of earlier layers cost much, that is better than going on.
        """
        constant = rows.new_zeros(len(rows))
        least = rows.new_full((len(rows),), -torch.inf)
        trail = []
        for line, layer in zip(reversed(lines), reversed(self.layers[:-1]), strict=True):
            sizes = rows.abs()
            here = constant + (rows * line.middle[box]).sum(1) - (sizes * line.radius[box]).sum(1)
            least = torch.maximum(least, here)
            constant = constant - (sizes * line.loss[box]).sum(1)
            if layer.rectified:
                trail.append(rows)
                constant += (rows * line.half_offset[box]).sum(1)
                mean, gap = (line.adaptive + line.chord) / 2, (line.adaptive - line.chord) / 2
                rows = torch.addcmul(rows * mean[box], sizes, gap[box])
            constant += rows @ layer.bias
            rows = rows @ layer.weight
        return rows, constant, least, trail


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
    """The relaxation of h = max(z, 0) over [lower, upper], or of h = z if not `rectified`."""
    if not rectified:
        none = torch.zeros_like(lower)
        return _Lines(none, none, none, error, (lower + upper) / 2, (upper - lower) / 2 + error)
    below, above = lower.clamp(max=0.0), upper.clamp(min=0.0)
    chord = above / (above - below).clamp(min=_TINY)
    chord = chord.where(lower < 0, 1.0).where(upper > 0, 0.0)
    unstable = (lower < 0) & (upper > 0)
    # What both ends need of a line with a rounded slope, and a little more; no line holds where an end is unknown.
    offset = torch.maximum(-chord * below, (1 - chord) * above) * (1 + 1e-14)
    offset = offset.where(unstable, 0.0)
    adaptive = (chord > 0.5).to(chord.dtype).where(unstable, chord)
    low, high = lower.relu(), above
    return _Lines(chord, adaptive, offset / 2, offset / 2 + error, (low + high) / 2, (high - low) / 2 + error)


def _generators(sizes: Tensor) -> Tensor:
    """[B, most, out]: one generator for each number of `sizes` [B, out] that is not 0, filled up with zeros."""
    box, neuron = (sizes != 0).nonzero(as_tuple=True)
    place = (sizes != 0).cumsum(1)[box, neuron] - 1
    most = int(place.max()) + 1 if len(place) else 0
    new = sizes.new_zeros(len(sizes), most, sizes.shape[1])
    new[box, place, neuron] = sizes[box, neuron]
    return new


def _integers(values: Tensor) -> tuple[np.ndarray, int]:
    """Floats as integers over one power of two."""
    ratios = [value.as_integer_ratio() for value in values.flatten().tolist()]
    scale = max(below for _, below in ratios)
    return np.array([above * (scale // below) for above, below in ratios], object).reshape(values.shape), scale
