"""Certificates by alpha-CROWN: linear bounds whose slopes are optimised for each input (Xu et al., ICLR 2021)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from trivet.certify.bounds.certifier import Query
from trivet.certify.crown import Crown
from trivet.methods import method


@method(title="alpha-CROWN", paper="Xu et al., ICLR 2021", year=2021, legs="robust")
@dataclass(frozen=True)
class AlphaCrown(Crown):
    """After CROWN, the slope below every unstable rectifier is chosen for each margin by 20 steps of Adam.

    Step size 0.1, falling by 2 % a step; slopes are clamped to [0, 1], and the best of all steps is kept for each
    margin, so that the bound is never below CROWN's. Any slope in [0, 1] gives a true bound: the search runs without
    error terms, and its result is computed anew with them. Needs memory for a handful of numbers for each margin and
    rectifier.

    Attributes:
        inner: also choose slopes for the bounds of every unstable neuron inside the network, each for itself: tighter,
            and some 10 times dearer. The paper optimises them for the margins, jointly.
    """

    inner: bool = False

    def bounds(self, query: Query) -> Iterator[Tensor]:
        yield from super().bounds(query)
        yield query.margins("alpha-crown")
        if self.inner:
            query.tighten("alpha-crown")
            yield query.margins("alpha-crown")
