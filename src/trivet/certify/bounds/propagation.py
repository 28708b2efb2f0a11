"""One use of a network: its layers in one arithmetic, intervals forward and linear bounds backward through them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from trivet.certify.bounds.activations import Rectifier
from trivet.certify.bounds.affine import Convolution, Linear
from trivet.certify.bounds.interval import Domain, Interval
from trivet.certify.bounds.layer import Affine, Layer
from trivet.certify.bounds.moving import Sum
from trivet.certify.bounds.rounding import Rounding
from trivet.certify.bounds.staircase import Staircase

Lines = tuple[dict[int, Tensor], Tensor]
"""A linear function: rows of nodes, [B, S, ...] each, and constants [B, S]."""

Slopes = str | Mapping[int, Tensor]
"""Of the lower lines of unstable rectifiers: by name for all, or chosen for each node, [B, S, ...] or [B, 1, ...]."""

_ELEMENTS = 1 << 23
"""Numbers in the largest tensor of one backward pass over many neurons."""


@dataclass(frozen=True, eq=False)
class Propagation:
    """Node 0 is the input; node i the output of layer i - 1, which reads the nodes `inputs[i - 1]`."""

    layers: Sequence[Layer]
    inputs: Sequence[tuple[int, ...]]
    domain: Domain
    rounding: Rounding | None

    def intervals(
        self,
        known: Sequence[Interval] | None = None,
        *,
        tighten: Callable[[int, Sequence[Interval]], Interval] | None = None,
        signs: Mapping[int, Tensor] | None = None,
    ) -> list[Interval]:
        """Of every node, layer by layer, never looser than `known`, and on the side of 0 that `signs` say.

        `tighten` finds a tighter interval of a node, given all up to it; it is asked of the inputs of nonlinear layers,
        where that can help.
        """
        found = [self.domain.interval(self.rounding)]
        found[0] = found[0].intersect(known[0]) if known else found[0]
        rough = self._rough() if tighten is not None else ()
        for node, layer in enumerate(self.layers, 1):
            interval = layer.bounds([found[i] for i in self.inputs[node - 1]], self.rounding)
            found.append(interval.intersect(known[node]) if known else interval)
            if node in rough and tighten is not None:
                found[node] = tighten(node, found)
            if signs and node in signs:
                found[node] = found[node].on(signs[node])
        return found

    def pull(
        self,
        rows: Tensor,
        node: int,
        intervals: Sequence[Interval],
        slopes: Slopes,
        *,
        affine_only: bool = False,
        multipliers: Mapping[int, Tensor] | None = None,
    ) -> Lines:
        """A lower bound of <rows, node>, linear in earlier nodes, [B, S, ...] each, and its constant [B, S].

        That is in node 0, the input, or with `affine_only` in the nodes where the last affine layers begin. Rounding of
        the outputs themselves to a grid does not end them: it costs a step, and without it rows would not be merged.

        Args:
            multipliers: of nodes n, [B, S or 1, ...]: <multiplier, n> >= 0 is known to hold, and is taken off.
        """
        waiting, held = {node: rows}, {}
        constant = rows.new_zeros(rows.shape[:2])
        for at in range(node, 0, -1):
            here = waiting.pop(at, None)
            if here is None:
                continue
            if multipliers and at in multipliers:
                here = here - multipliers[at]
            layer, before = self.layers[at - 1], self.inputs[at - 1]
            if affine_only and not isinstance(layer, Affine) and at != self.rounded_outputs:
                held[at] = here
                continue
            slope = slopes if isinstance(slopes, str) else slopes.get(at, "adaptive")
            pulled = layer.pull(
                here, [intervals[i] for i in before], intervals[at], slope, self.rounding, len(self.layers)
            )
            constant = constant + pulled.constant
            for i, each in zip(before, pulled.rows, strict=True):
                waiting[i] = waiting[i] + each if i in waiting else each
        return {**held, **waiting}, constant

    def least(self, lines: Mapping[int, Tensor], constant: Tensor, intervals: Sequence[Interval]) -> Tensor:
        """The smallest value of a linear bound, [B, S]; minus infinity where it is no number."""
        total = constant
        for node, rows in lines.items():
            total = total + (intervals[node] if node else self.domain).least(rows, self.rounding)
        return total if self.rounding is None else total.nan_to_num(-torch.inf, torch.inf, -torch.inf)

    @cached_property
    def rounded_outputs(self) -> int | None:
        """The node where outputs are rounded to a grid, if nothing but affine layers is behind it."""
        last = max((at for at, layer in enumerate(self.layers, 1) if not isinstance(layer, Affine)), default=0)
        return last if last and isinstance(self.layers[last - 1], Staircase) else None

    def behind(self, node: int) -> set[int]:
        """The nodes on which `node` depends, and itself."""
        found = {node}
        for at in range(node, 0, -1):
            if at in found:
                found.update(self.inputs[at - 1])
        return found

    def _rough(self) -> set[int]:
        """The nodes that a nonlinear layer reads and that a backward pass may tighten.

        Behind a single layer that mixes numbers intervals are exact already, and so they are behind a monotone function
        of tight ones.
        """
        mixed, monotone = [0], [False]
        rough: set[int] = set()
        for layer, before in zip(self.layers, self.inputs, strict=True):
            depth = max(mixed[i] for i in before)
            linear = isinstance(layer, Affine)
            mixed.append(depth + isinstance(layer, (Linear, Convolution, Sum)) if linear else 2)
            monotone.append(not linear)
            if not linear:
                rough.update(i for i in before if mixed[i] > 1 and not monotone[i])
        return rough

    @torch.no_grad()
    def loose(self, node: int, interval: Interval) -> Tensor:
        """[B, numbers]: where a tighter interval would tighten something."""
        readers = [layer for layer, before in zip(self.layers, self.inputs, strict=True) if node in before]
        if all(isinstance(each, Rectifier) for each in readers):
            return ((interval.lower < 0) & (interval.upper > 0)).flatten(1)
        return (interval.lower < interval.upper).flatten(1)

    def tightened(
        self, node: int, intervals: Sequence[Interval], pull: Callable[[Tensor, int, Sequence[Interval]], Lines]
    ) -> Interval:
        """Interval number `node` where its neurons are loose, by backward passes for them and their negatives.

        `pull` finds a lower bound of <rows, node>. Neurons whose relaxation is exact already are left out.
        """
        old = intervals[node]
        loose = self.loose(node, old)
        most = int(loose.sum(1).max()) if loose.numel() else 0
        if not most:
            return old
        order = loose.to(torch.uint8).argsort(stable=True, dim=1, descending=True)[:, :most]
        shape = old.shape[1:]
        widest = max(each.shape[1:].numel() for each in intervals[: node + 1])
        portion = max(1, _ELEMENTS // (2 * len(loose) * widest))
        lower, upper = old.lower.flatten(1), old.upper.flatten(1)
        found = []
        for places in order.split(portion, 1):
            rows = lower.new_zeros(len(loose), places.shape[1], loose.shape[1]).scatter_(2, places[:, :, None], 1.0)
            both = torch.cat([rows, -rows], 1).unflatten(2, shape)
            found.append(self.least(*pull(both, node, intervals), intervals).unflatten(1, (2, -1)))
        low, high = torch.cat(found, 2).unbind(1)
        new = Interval(lower.scatter(1, order, low).view(old.shape), upper.scatter(1, order, -high).view(old.shape))
        return old.intersect(new)
