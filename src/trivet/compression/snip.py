"""SNIP: weights whose removal would change the loss least go, at the start (Lee, Ajanthan & Torr, ICLR 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from trivet.compression.pruner import LossOf, Pruner, mean_gradients, weights_of
from trivet.compression.scope import Scope
from trivet.methods import method


@method(title="SNIP", paper="Lee, Ajanthan & Torr, ICLR 2019", year=2019, legs="small")
@dataclass(frozen=True)
class Snip(Pruner):
    """score = |w * dL/dw| on a few records, compared over all layers; meant for a network before it is trained.

    Under a robust objective it is adversarial SNIP. At few percent, whole layers may be left without weights.
    """

    reads_records: ClassVar[bool] = True
    scope: ClassVar[Scope] = "global"

    def score(
        self,
        model: nn.Module,
        names: Sequence[str],
        input_shape: tuple[int, ...],
        losses: Sequence[LossOf],
        draw: torch.Generator,
    ) -> dict[str, Tensor]:
        weights = weights_of(model, names)
        gradients = mean_gradients(losses, model, list(weights.values()))
        return {
            name: (weight.detach() * gradient).abs()
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
        }
