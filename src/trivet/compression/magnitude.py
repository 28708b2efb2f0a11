"""Pruning by magnitude: the smallest weights go (Han et al., NeurIPS 2015)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from trivet.compression.pruner import LossOf, Pruner, weights_of
from trivet.methods import method


@method(title="Magnitude pruning (LWM)", paper="Han et al., NeurIPS 2015", year=2015, legs="small")
@dataclass(frozen=True)
class Magnitude(Pruner):
    """score = |w|^power. With fine-tuning under a robust objective, this is LWM, the baseline of robust pruning.

    Reads no record.

    Attributes:
        power: 2 compares units of a pattern, such as filters, by their l2 norms, 1 by their l1 norms; for single
            weights both are the same.
    """

    power: Literal[1, 2] = 1

    def score(
        self,
        model: nn.Module,
        names: Sequence[str],
        input_shape: tuple[int, ...],
        losses: Sequence[LossOf],
        draw: torch.Generator,
    ) -> dict[str, Tensor]:
        return {name: weight.detach().abs() ** self.power for name, weight in weights_of(model, names).items()}
