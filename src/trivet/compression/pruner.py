"""The protocol of a pruner: how much each weight of a network matters, before anything learns which."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trivet.compression.scope import Scope

LossOf = Callable[[nn.Module], Tensor]
"""The mean loss of a network on some records that stay the same, differentiable in its parameters."""


class Pruner(ABC):
    """Scores the weights of a network, the larger the more they matter.

    Attributes:
        reads_records: whether the scores depend on records, through `losses`.
        scope: how the method's own paper spreads a density over layers.
    """

    room: ClassVar[str] = "compression"
    reads_records: ClassVar[bool] = False
    scope: ClassVar[Scope] = "layerwise"

    @property
    def steps(self) -> int:
        """How often weights are scored and dropped until the density is reached, each time by the same factor."""
        return 1

    @abstractmethod
    def score(
        self,
        model: nn.Module,
        names: Sequence[str],
        input_shape: tuple[int, ...],
        losses: Sequence[LossOf],
        draw: torch.Generator,
    ) -> dict[str, Tensor]:
        """Scores of the weights of the layers `names`, shaped as they are.

        `model` has plain weights, zero where they were dropped before, and is a copy to be used up. The mean of
        `losses` is what the scores are about; there are none for a pruner that reads no records. Inputs have
        `input_shape` (C, H, W). `draw` is the source of all randomness.
        """


def weights_of(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Parameter]:
    """The weights of layers, by their names."""
    found: Mapping[str, Any] = {name: model.get_submodule(name).weight for name in names}
    return dict(found)


def mean_gradients(losses: Sequence[LossOf], model: nn.Module, weights: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of the mean loss by each of `weights`."""
    total = [torch.zeros_like(weight) for weight in weights]
    for loss in losses:
        for sum_, gradient in zip(total, torch.autograd.grad(loss(model), weights), strict=True):
            sum_ += gradient / len(losses)
    return total
