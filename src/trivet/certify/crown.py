"""Certificates by linear bounds backward through the network: CROWN (Zhang et al., 2018) and CROWN-IBP (2020)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from trivet.certify.bounds.certifier import BoundCertifier, Query, slopes_of
from trivet.certify.bounds.network import Slope
from trivet.methods import method


@method(title="CROWN-IBP", name="crown_ibp", paper="Zhang et al., ICLR 2020", year=2020, legs="robust")
@dataclass(frozen=True)
class CrownIbp(BoundCertifier):
    """After IBP, one backward pass of the margins, between lines around every unstable rectifier with IBP's intervals.

    Over [l, u] with l < 0 < u a rectifier lies below its chord u (t - l) / (u - l), and above a t for every a in
    [0, 1]. Rows of the margins are pulled back through the layers; a positive entry meets the lower line, a negative
    one the upper. At the input the bound is linear, and its minimum over the ball is exact.

    Attributes:
        slopes: a for each pass: 1 where u > -l and else 0 (`adaptive`), `zero`, `one`, or the chord's (`same`). On
            networks trained by IBP `zero` can be far tighter, on others `adaptive` is.
    """

    slopes: tuple[Slope, ...] = ("adaptive", "zero")

    def __post_init__(self) -> None:
        super().__post_init__()
        slopes_of(self.slopes)

    def bounds(self, query: Query) -> Iterator[Tensor]:
        yield query.margins("ibp")
        for slope in self.slopes:
            yield query.margins("crown-ibp", slope)


@method(title="CROWN", paper="Zhang et al., NeurIPS 2018", year=2018, legs="robust")
@dataclass(frozen=True)
class Crown(CrownIbp):
    """As CROWN-IBP, and then with intervals that backward passes tighten, layer by layer.

    Only neurons that are still unstable get a pass of their own, and what it finds is intersected with what is known:
    never looser than IBP, unlike the bound as published. With slopes `same` alone, and intervals of such passes only,
    it is Fast-Lin (Weng et al., ICML 2018), the dual of Wong & Kolter's linear programme (ICML 2018). Takes time
    for as many rows as there are unstable neurons, each as long as what its neuron sees (`bounds.neurons`), and memory
    for a portion of them: minutes for one input of a large convolutional network.
    """

    def bounds(self, query: Query) -> Iterator[Tensor]:
        yield from super().bounds(query)
        for slope in self.slopes:
            query.tighten("crown", slope)
            yield query.margins("crown", slope)
