"""Branch and bound on rectifiers: cases of which side of 0 a neuron is on, until each excludes counterexamples.

BaB with alpha-beta-CROWN (Wang et al., NeurIPS 2021): the cases of a batch are bounded with slopes, and with a
multiplier for each side that is assumed, chosen by gradient ascent (`Network.lines`); what intervals are known of the
whole box stays true in every case. The neuron to decide next is the one whose relaxation costs the bound most (after
BaBSR, Bunel et al., JMLR 2020).
"""

from __future__ import annotations

import heapq
import itertools

import torch
from torch import Tensor

from trivet.certify.bounds.interval import Box, Interval
from trivet.certify.bounds.network import Network
from trivet.certify.dense_crown import DenseNetwork
from trivet.certify.queries import Queries, Search, least_value, refuse_above, shifted

_Case = tuple[float, int, Tensor]
"""The bound of the case this one was cut from, a number to break ties, and the signs [sum of widths]."""


def search(network: Network, dense: DenseNetwork, queries: Queries, run: Search, batch: int = 64) -> bool:
    """As `input_splits.search`, for one query after the other.

    Args:
        dense: the same network, written out.
    """
    known: list[Interval] = []
    for query in range(len(queries)):
        box = queries.lower[query : query + 1], queries.upper[query : query + 1]
        earlier = query and all(
            torch.equal(end, ends[query - 1 : query])
            for end, ends in zip(box, (queries.lower, queries.upper), strict=True)
        )
        if not earlier:
            shape = network.shapes[0]
            whole = Box(*(end.view(1, *shape) for end in box))
            known = network.intervals(whole, dense.arithmetic, method="crown")
        if not _Cases(network, dense, queries, query, known, run).search(batch):
            return False
    return True


class _Cases:
    """The search through the cases of one query."""

    def __init__(
        self,
        network: Network,
        dense: DenseNetwork,
        queries: Queries,
        query: int,
        known: list[Interval],
        run: Search,
    ) -> None:
        self.network, self.dense, self.queries, self.query, self.run = network, dense, queries, query, run
        self.known = known
        self.rows = queries.rows[query][queries.used[query]]
        # The pre-activations that rectifiers read, in order, side by side.
        self.nodes = [before for _, before in network.activations]
        self.sizes = [network.shapes[node].numel() for node in self.nodes]
        ends = [torch.cat([getattr(known[n], end).flatten(1) for n in self.nodes], 1)[0] for end in ("lower", "upper")]
        self.lower, self.upper = ends

    def search(self, batch: int) -> bool:
        order = itertools.count()
        waiting: list[_Case] = [(-torch.inf, next(order), torch.zeros(len(self.lower), dtype=torch.int8))]
        while waiting:
            if self.run.late:
                return False
            taken = [heapq.heappop(waiting) for _ in range(min(batch, len(waiting)))]
            signs = torch.stack([each for _, _, each in taken])
            self.run.boxes += len(signs)
            least = self._least(signs)
            if least is None:
                return False
            open_ = ~(least > 0)
            if not bool(open_.any()):
                continue
            signs, least = signs[open_], least[open_]
            neuron = self._costliest(signs)
            if neuron is None:
                return False
            for case, bound, at in zip(signs, least.tolist(), neuron.tolist(), strict=True):
                for sign in (1, -1):
                    child = case.clone()
                    child[at] = sign
                    heapq.heappush(waiting, (bound, next(order), child))
        return True

    def _least(self, signs: Tensor) -> Tensor | None:
        """For each case the best bound of any constraint, [B]; None if a point it suggests is a counterexample."""
        count, shape = len(signs), self.network.shapes[0]
        lower, upper = (end[self.query].expand(count, -1) for end in (self.queries.lower, self.queries.upper))
        domain = Box(lower.reshape(count, *shape), upper.reshape(count, *shape))
        parts = signs.split(self.sizes, 1)
        sides = {n: part.view(count, *self.network.shapes[n]) for n, part in zip(self.nodes, parts, strict=True)}
        intervals = [
            Interval(each.lower.expand(count, *each.shape[1:]), each.upper.expand(count, *each.shape[1:]))
            for each in self.known
        ]
        slope, constant = self.network.lines(
            domain,
            self.rows[None, :, :-1].expand(count, -1, -1),
            method="alpha-crown",
            arithmetic=self.dense.arithmetic,
            intervals=intervals,
            signs=sides,
        )
        slope, constant = slope.flatten(2), shifted(constant, self.rows[:, -1])
        least = least_value(slope, constant, lower[:, None], upper[:, None])
        if not signs.any():
            middle = self.dense((lower[:1] + upper[:1]) / 2)
            refuse_above(least[:1], middle @ self.rows[:, :-1].T + self.rows[:, -1])
        points = torch.where(slope > 0, lower[:, None], upper[:, None]).flatten(0, 1)
        index = torch.full((len(points),), self.query)
        if self.run.falsified(points, index, self.queries.values(self.dense(points), index)):
            return None
        return least.amax(1)

    def _costliest(self, signs: Tensor) -> Tensor | None:
        """The neuron to decide in each case, [B]; None if a case has none left."""
        lower = self.lower.clamp(min=0.0).where(signs > 0, self.lower)
        upper = self.upper.clamp(max=0.0).where(signs < 0, self.upper)
        unstable = (lower < 0) & (upper > 0)
        if not bool(unstable.any(1).all()):
            return None
        below, above = lower.clamp(max=0.0), upper.clamp(min=0.0)
        share = above / (above - below).clamp(min=1e-290)
        chord = torch.where(unstable, share, (above > 0).to(share.dtype))
        rows = self.rows[:, :-1].abs().sum(0)[None] if len(self.rows) > 1 else self.rows[:, :-1]
        coefficients = rows.expand(len(signs), -1)
        costs: list[Tensor] = []
        chords = list(chord.split(self.sizes, 1))
        for layer in reversed(self.dense.layers):
            if layer.rectified:
                costs.append(coefficients.abs())
                coefficients = coefficients * chords.pop()
            coefficients = coefficients @ layer.weight
        cost = torch.cat(costs[::-1], 1) * share * -below
        return cost.where(unstable, -1.0).argmax(1)
