"""Certificates by interval bound propagation (Gowal et al., 2018; as boxes: Mirman et al., ICML 2018)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from trivet.certify.bounds.certifier import BoundCertifier, Query
from trivet.methods import method


@method(title="Interval bound propagation", paper="Gowal et al., 2018", year=2018, legs="robust")
@dataclass(frozen=True)
class Ibp(BoundCertifier):
    """An interval for every value, from layer to layer, in the middle and radius form: |W| r around W c + b.

    The specification is merged into the last layer: rows of C W, not differences of bounds of logits. A ball other than
    Linf enters by the dual norms of the first layer's rows. The cheapest bound, and a loose one: it certifies networks
    that were trained for it, and next to nothing of others.
    """

    def bounds(self, query: Query) -> Iterator[Tensor]:
        yield query.margins("ibp")
