"""Intervals of single neurons by backward passes (CROWN), where most of a network has no part in most of them.

The same bounds as `Propagation.pull` gives for rows of the identity, without gradients, and of most of the work rid:

- only neurons that are still unstable are looked at, record by record, in portions that stay in the cache;
- the first step is no product: a row of the identity takes a row of the weights;
- both ends of a neuron share the way down to the first rectifier, and where they part they do so in its unstable
  neurons alone: the lower bounds of z and of -z have the rows M + D and -M + D, with D only there;
- rectifiers that are off end their columns;
- behind convolutions a row is a window, what of the map its neuron sees, as long as that is the smaller;
- what a layer's relaxation and error terms are is computed once for all neurons behind it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from trivet.certify.bounds.activations import Activation, Relaxed
from trivet.certify.bounds.affine import Convolution, Linear
from trivet.certify.bounds.interval import Ball, Interval
from trivet.certify.bounds.layer import Affine
from trivet.certify.bounds.moving import Padding, Reshaping, Scale, Sum
from trivet.certify.bounds.propagation import Propagation
from trivet.certify.bounds.rows import (
    Columns,
    Rows,
    Units,
    Windows,
    absolute,
    inner_of,
    joined,
    moved,
    multiplied,
    points,
    scaled,
    seen,
    seen_by,
    signed,
    transposed,
    written,
)

PORTION = 1 << 19
"""Numbers in the largest tensor of a pass: what the cache of a core holds."""
FEW = 1 << 17
"""Numbers in the rows of all neurons, below which one pass for all records takes less time."""
FIRST = 64
"""Neurons in the first pass of a node; it shows how large rows become."""


@dataclass(eq=False)
class Neurons:
    """Tightens the intervals of one use of a network, node after node; the slopes of rectifiers are named."""

    use: Propagation
    slope: str
    relaxed: dict[int, Relaxed] = field(default_factory=dict)
    slack: dict[int, Tensor] = field(default_factory=dict)
    largest: dict[int, int] = field(default_factory=dict)
    matrices: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    count: int = 0

    def tightened(self, node: int, intervals: Sequence[Interval]) -> Interval:
        """Interval number `node`, by passes for its unstable neurons; those before it are final."""
        old, use = intervals[node], self.use
        loose = use.loose(node, old)
        widest = max(each.shape[1:].numel() for each in intervals[: node + 1])
        if torch.is_grad_enabled() or old.lower.device.type != "cpu" or 2 * int(loose.sum()) * widest <= FEW:
            return use.tightened(node, intervals, lambda rows, at, found: use.pull(rows, at, found, self.slope))
        self.count = 2 * int(loose.sum())
        lower, upper = old.lower.flatten(1).clone(), old.upper.flatten(1).clone()
        for record, row in enumerate(loose):
            (places,) = torch.where(row)
            while len(places):
                most = max(1, PORTION // self.largest[node]) if node in self.largest else FIRST
                part, places = places[:most], places[most:]
                ends = _Pass(self, intervals, record, node).ends(part)
                lower[record, part], upper[record, part] = ends[: len(part)], -ends[len(part) :]
        return old.intersect(Interval(lower.view(old.shape), upper.view(old.shape)))

    @cached_property
    def corners(self) -> tuple[Tensor, Tensor]:
        """Middle and radius of the box of inputs, with the errors of adding up products with them."""
        box = self.use.domain.interval(self.use.rounding)
        return box.middle, box.spread(self.use.rounding, box.shape[1:].numel())

    def relaxation(self, at: int, layer: Activation, intervals: Sequence[Interval]) -> Relaxed:
        """Of all records, for rows of node `at`."""
        if at not in self.relaxed:
            before, output = intervals[self.use.inputs[at - 1][0]], intervals[at]
            count = output.shape[1:].numel() + 4 * len(self.use.layers)
            self.relaxed[at] = layer.relaxed(before, output, self.slope, self.use.rounding, count)
        return self.relaxed[at]

    def errors(self, at: int, layer: Affine, intervals: Sequence[Interval]) -> Tensor | None:
        """What is taken off for each number of node `at` in absolute value, [B, ...]."""
        if self.use.rounding is None:
            return None
        if at not in self.slack:
            sizes = [intervals[i] for i in self.use.inputs[at - 1]]
            count = intervals[at].shape[1:].numel() + 4 * len(self.use.layers)
            self.slack[at] = layer.slack(sizes, self.use.rounding, count).expand(intervals[at].shape)
        return self.slack[at]

    def matrix(self, at: int, layer: Convolution, windows: Tensor) -> Tensor | None:
        """The convolution's transpose for windows of this size, [C h w, C', h', w']; None where it does not pay.

        A product with it computes many zeros, at a far higher speed than that of a convolution of small maps.
        """
        key = (at, *windows.shape[2:])
        if key not in self.matrices:
            size, seen = windows[0].numel(), layer.weight.shape[1] * layer.groups
            extent = [
                (side - 1) * stride + dilation * (kernel - 1) + 1
                for side, stride, dilation, kernel in zip(
                    windows.shape[2:], layer.stride, layer.dilation, layer.weight.shape[2:], strict=True
                )
            ]
            zeros = layer.groups * math.prod(extent) / math.prod(layer.weight.shape[2:])
            faster = 5 * max(1.0, 16 / seen)
            if zeros > faster or 2 * size > self.count:
                return None
            eye = torch.eye(size, dtype=windows.dtype, device=windows.device).view(size, *windows.shape[1:])
            self.matrices[key] = transposed(eye, layer)
        return self.matrices[key]


class _Pass:
    """A backward pass for some neurons z of one record, and for -z: constants [R] until they part, then [2 R]."""

    def __init__(self, owner: Neurons, intervals: Sequence[Interval], record: int, node: int) -> None:
        self.owner, self.use, self.intervals, self.record, self.node = owner, owner.use, intervals, record, node
        self.waiting: dict[int, Rows] = {}
        self.parted = False
        self.constant, self.loss = torch.empty(0), torch.empty(0)

    def ends(self, places: Tensor) -> Tensor:
        """[2 R], lower bounds of z and of -z."""
        one = self.intervals[self.node].lower.new_ones(len(places))
        self.constant, self.loss = torch.zeros_like(one), torch.zeros_like(one)
        self.waiting = {self.node: Units(places, one, plain=True)}
        for at in range(self.node, 0, -1):
            if at in self.waiting:
                self._through(at)
        self._part()
        total = self.constant + self._least(self.waiting[0]) if 0 in self.waiting else self.constant
        return total if self.use.rounding is None else total.nan_to_num(-torch.inf, torch.inf, -torch.inf)

    def _through(self, at: int) -> None:
        layer, before = self.use.layers[at - 1], self.use.inputs[at - 1]
        if not isinstance(layer, Affine):
            self._part(at)
        rows = self.waiting.pop(at)
        if isinstance(layer, Activation):
            found: Sequence[Rows] = (self._activation(at, layer, rows),)
        elif isinstance(layer, Affine):
            found = self._affine(at, layer, rows)
        else:
            found = self._generic(at, self._dense(rows, at))
        for node, each in zip(before, found, strict=True):
            self.waiting[node] = self._sum(node, self.waiting[node], each) if node in self.waiting else each
        self._measure(found)

    def _measure(self, found: Sequence[Rows]) -> None:
        for rows in found:
            if not isinstance(rows, Units):
                values = rows if isinstance(rows, Tensor) else rows.values
                count = values[0].numel() * (1 if self.parted else 2)
                self.owner.largest[self.node] = max(self.owner.largest.get(self.node, 1), count)

    # Constants: `constant` has the sign of the row, `loss` is taken off whatever the sign.

    def _part(self, but: int | None = None) -> None:
        """From here on rows of z and of -z, one after the other; those of node `but` see to it themselves."""
        if self.parted:
            return
        self.parted = True
        self.constant = torch.cat([self.constant - self.loss, -self.constant - self.loss])
        for node, rows in self.waiting.items():
            if node != but:
                self.waiting[node] = self._both(node, rows)
        if but is not None and not self._pairs(but):
            self.waiting[but] = self._both(but, self.waiting[but])

    def _both(self, node: int, rows: Rows) -> Rows:
        if isinstance(rows, Tensor):
            return torch.cat([rows, -rows])
        if isinstance(rows, Units):
            return Units(torch.cat([rows.places] * 2), torch.cat([rows.factor, -rows.factor]))
        both = torch.cat([rows.values, -rows.values])
        if isinstance(rows, Windows):
            return replace(rows, values=both, corner=torch.cat([rows.corner] * 2))
        return replace(rows, values=both)

    def _pairs(self, at: int) -> bool:
        """Whether the rows of node `at`, an activation's, go on as sums and differences."""
        known = isinstance(self.waiting[at], (Tensor, Columns))
        return known and self.use.rounding is None and self._into_dense(at)

    def _into_dense(self, at: int) -> bool:
        """Whether the activation `at` reads a fully connected layer: no others take rows by columns."""
        node = self.use.inputs[at - 1][0]
        while node and isinstance(self.use.layers[node - 1], Reshaping):
            node = self.use.inputs[node - 1][0]
        shape = self.intervals[node].shape
        return bool(node) and isinstance(self.use.layers[node - 1], Linear) and len(shape) == 2

    def _add(self, constant: Tensor) -> None:
        self.constant = self.constant + constant

    def _take(self, loss: Tensor) -> None:
        if self.parted:
            self.constant = self.constant - loss
        else:
            self.loss = self.loss + loss

    # Activations

    def _activation(self, at: int, layer: Activation, rows: Rows) -> Rows:
        relaxed = self.owner.relaxation(at, layer, self.intervals)
        low, gap, second = (each[self.record, 0] for each in (relaxed.low, relaxed.gap, relaxed.second))
        first = None if relaxed.first is None else relaxed.first[self.record, 0]
        if isinstance(rows, Windows):
            return self._windowed(rows, low, gap, first, second)
        if isinstance(rows, Columns) and not self._into_dense(at):
            rows = self._dense(rows, at)
        flat = rows.values if isinstance(rows, Columns) else self._dense(rows, at).flatten(1)
        ends = [each.flatten() for each in (low, gap, second)]
        start = None if first is None else first.flatten()
        if not self._into_dense(at):
            below = flat.clamp(max=0.0)
            self._add(below @ ends[2] if start is None else below @ ends[2] + flat @ start)
            return (flat * ends[0]).addcmul_(below, ends[1]).view(-1, *low.shape)
        columns = rows.columns if isinstance(rows, Columns) else None
        if columns is not None:
            ends = [each[columns] for each in ends]
            start = None if start is None else start[columns]
        on = (ends[0] != 0) | (ends[1] != 0)
        if start is not None:
            on = on | (start != 0)
        (kept,) = torch.where(on)
        if len(kept) < 0.9 * len(on):
            flat = flat.index_select(1, kept)
            ends = [each[kept] for each in ends]
            start = None if start is None else start[kept]
        else:
            kept = torch.arange(len(on), device=on.device)
        columns = kept if columns is None else columns[kept]
        paired = len(self.constant) == 2 * len(flat)
        below = flat.clamp(max=0.0)
        constant = below @ ends[2]
        if start is not None:
            constant = constant + flat @ start
        if not paired:
            self._add(constant)
            return Columns((flat * ends[0]).addcmul_(below, ends[1]), columns, low.shape)
        # Of -z: below' = -above, so that the rows are low r + gap below and -low r - gap above.
        other = (below - flat) @ ends[2]
        self._add(torch.cat([constant, other if start is None else other - flat @ start]))
        (parts,) = torch.where(ends[1])
        parting = flat.index_select(1, parts).abs_().mul_(-0.5 * ends[1][parts])
        return Columns(flat * torch.add(ends[0], ends[1], alpha=0.5), columns, low.shape, parting, columns[parts])

    def _windowed(self, rows: Windows, low: Tensor, gap: Tensor, first: Tensor | None, second: Tensor) -> Windows:
        # Outside of the map all four are 0, and what has been there goes.
        below = rows.values.clamp(max=0.0)
        self._add((below * seen(second, rows)).flatten(1).sum(1))
        if first is not None:
            self._add((rows.values * seen(first, rows)).flatten(1).sum(1))
        new = (rows.values * seen(low, rows)).addcmul_(below, seen(gap, rows))
        return replace(rows, values=new, inside=True)

    # Affine layers

    def _affine(self, at: int, layer: Affine, rows: Rows) -> Sequence[Rows]:
        shape = self.intervals[at].shape[1:]
        step = self._step(at, layer, rows)
        if step is None:
            rows = self._dense(rows, at)
            step = self._step(at, layer, rows)
        if isinstance(rows, Windows) and not rows.inside:
            ones = rows.values.new_ones(1, *shape[1:])
            rows = replace(rows, values=rows.values * seen(ones, rows), inside=True)
        c, slack = layer.constant(), self.owner.errors(at, layer, self.intervals)
        if c is not None:
            self._add(inner_of(rows, c.expand(shape)))
        if slack is not None:
            self._take(inner_of(absolute(rows), slack[self.record]))
        if step is None:
            shapes = [self.intervals[i].shape[1:] for i in self.use.inputs[at - 1]]
            return layer.transposed(self._dense(rows, at), shapes)
        return step(rows)

    def _step(self, at: int, layer: Affine, rows: Rows) -> Callable[[Any], Sequence[Rows]] | None:
        """How rows of this kind go through a layer of this kind, where they need not be written out."""
        shape, size = (self.intervals[i].shape[1:] for i in (self.use.inputs[at - 1][0], at))
        if isinstance(layer, Sum):
            return lambda given: [signed(given, sign) for sign in layer.signs]
        if isinstance(layer, Scale):
            return lambda given: [scaled(given, layer.factor, size)]
        if isinstance(rows, Units) and isinstance(layer, Reshaping):
            return lambda given: [given]
        if isinstance(rows, Columns) and isinstance(layer, Reshaping):
            return lambda given: [replace(given, shape=shape)]
        if isinstance(layer, Linear) and len(shape) == 1 and isinstance(rows, (Units, Columns)):
            return lambda given: [multiplied(given, layer.weight)]
        if isinstance(layer, Convolution) and len(layer.stride) == 2:
            if isinstance(rows, Units) and layer.groups == 1:
                return lambda given: [self._fitted(seen_by(given, layer, size[1:]), shape)]
            if isinstance(rows, Windows):
                return lambda given: [self._fitted(self._convolved(at, layer, given), shape)]
        if isinstance(layer, Padding) and isinstance(rows, Windows) and layer.filled is None:
            before = layer.before
            return None if before is None else lambda given: [moved(given, *before)]
        return None

    def _convolved(self, at: int, layer: Convolution, rows: Windows) -> Windows:
        matrix = self.owner.matrix(at, layer, rows.values)
        if matrix is None:
            values = transposed(rows.values, layer)
        else:
            values = (rows.values.flatten(1) @ matrix.flatten(1)).view(-1, *matrix.shape[1:])
        top, left = (
            side * stride - pad
            for side, stride, pad in zip((rows.top, rows.left), layer.stride, layer.padding, strict=True)
        )
        return Windows(values, rows.corner, top, left, False)

    def _fitted(self, rows: Rows, shape: torch.Size) -> Rows:
        """Written out where windows are no small part of the map."""
        if isinstance(rows, Windows) and 2 * math.prod(rows.size) > shape[1:].numel():
            return written(rows, shape)
        return rows

    def _generic(self, at: int, rows: Tensor) -> Sequence[Tensor]:
        one = slice(self.record, self.record + 1)

        def of(interval: Interval) -> Interval:
            return Interval(interval.lower[one], interval.upper[one])

        inputs = [of(self.intervals[i]) for i in self.use.inputs[at - 1]]
        pulled = self.use.layers[at - 1].pull(
            rows[None], inputs, of(self.intervals[at]), self.owner.slope, self.use.rounding, len(self.use.layers)
        )
        self._add(pulled.constant[0])
        return [each[0] for each in pulled.rows]

    # Rows

    def _dense(self, rows: Rows, node: int) -> Tensor:
        shape = self.intervals[node].shape[1:]
        if isinstance(rows, Tensor):
            return rows
        if isinstance(rows, Windows):
            return written(rows, shape)
        if isinstance(rows, Units):
            zeros = rows.factor.new_zeros(len(rows.places), shape.numel())
            return zeros.scatter_(1, rows.places[:, None], rows.factor[:, None]).view(-1, *shape)
        values = rows.values.new_zeros(len(rows.values), shape.numel()).index_copy_(1, rows.columns, rows.values)
        if rows.parting is not None and rows.parts is not None:
            both = torch.cat([values, -values])
            values = both.index_add_(1, rows.parts, torch.cat([rows.parting] * 2))
        return values.view(-1, *shape)

    def _sum(self, node: int, one: Rows, other: Rows) -> Rows:
        if isinstance(one, Units) and isinstance(other, Windows):
            one, other = other, one
        if isinstance(one, Windows) and isinstance(other, Units):
            other = points(other, self.intervals[node].shape[1:])
        if isinstance(one, Windows) and isinstance(other, Windows):
            found = joined(one, other)
            if found is not None:
                return self._fitted(found, self.intervals[node].shape[1:])
        return self._dense(one, node) + self._dense(other, node)

    def _least(self, rows: Rows) -> Tensor:
        domain = self.use.domain
        if isinstance(domain, Ball) and domain.norm != "Linf":
            dense = self._dense(rows, 0)
            return domain[self.record : self.record + 1].least(dense[None], self.use.rounding)[0]
        middle, radius = (each[self.record] for each in self.owner.corners)
        if isinstance(rows, Windows):
            sizes = (rows.values.abs() * seen(radius, rows)).flatten(1).sum(1)
            return (rows.values * seen(middle, rows)).flatten(1).sum(1) - sizes
        flat = self._dense(rows, 0).flatten(1)
        return flat @ middle.flatten() - flat.abs() @ radius.flatten()
