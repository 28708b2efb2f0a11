"""Weights of m bits on an even grid through zero, with the scale that fits best (Yin et al., 2018)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trivet.compression.projection import Projection
from trivet.errors import require
from trivet.methods import method


@method(name="m_bit", title="m-bit weights", paper="Yin et al., SIAM J. Imaging Sciences 2018", year=2018, legs="small")
@dataclass(frozen=True)
class MBit(Projection):
    """A point of s {-L, …, -1, 0, 1, …, L}, L = 2^(bits - 1) - 1, near the weight: bits = 4 has 15 levels.

    Lloyd's rounds, at most 20: q = round(|w| / s) cut to L, halves down, then s = <|w|, q> / <q, q>. Neither half
    raises the distance; the end is a local optimum. They begin at s = 2 max|w| / (2^bits - 1), where `rule="author"`
    stops after one round: what Binary-Relax's code does at 4 bits.

    Attributes:
        bits: of a weight, 2 to 8.
        rule: "lloyd", or "author" for reproduction.
    """

    bits: int = 4
    rule: Literal["lloyd", "author"] = "lloyd"

    def __post_init__(self) -> None:
        require(2 <= self.bits <= 8, f"bits={self.bits} must lie between 2 and 8.")

    def project(self, weight: Tensor) -> Tensor:
        size = weight.detach().abs()
        top = 2 ** (self.bits - 1) - 1
        scale, levels = 2 * size.max() / (2**self.bits - 1), torch.zeros_like(size)
        for _ in range(20 if self.rule == "lloyd" else 1):
            before, levels = levels, self._levels(size, scale, top)
            if torch.equal(levels, before):
                break
            scale = (size * levels).sum() / levels.square().sum()
        return scale * levels * weight.detach().sign() + 0.0  # no negative zeros: on disk they are another value

    @staticmethod
    def _levels(size: Tensor, scale: Tensor, top: int) -> Tensor:
        return (size / scale - 0.5).ceil().clamp(0, top).nan_to_num(0.0)  # 0 / 0: all weights are zero
