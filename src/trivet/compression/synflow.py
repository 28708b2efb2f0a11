"""SynFlow: keep the weights through which most of the network's paths run (Tanaka et al., NeurIPS 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from trivet.compression.pruner import LossOf, Pruner, weights_of
from trivet.compression.scope import Scope
from trivet.errors import require
from trivet.methods import method
from trivet.models.normalize import Normalize

_NEUTRALISED = (Normalize, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm)


@method(title="SynFlow", paper="Tanaka et al., NeurIPS 2020", year=2020, legs="small", name="synflow")
@dataclass(frozen=True)
class SynFlow(Pruner):
    """score = | w * dR/dw |, where R is the sum of outputs of the network with weights |w| for an input of ones.

    Scored and dropped `rounds` times, the density falling by the same factor each time, over all layers together.
    Biases count as zero and normalisations as the identity, so that the scores of each layer on a path sum to R: no
    layer is emptied while another has weights to spare. In float64. Reads no record.

    Attributes:
        rounds: 100 in the paper; once is known to empty layers.
    """

    scope: ClassVar[Scope] = "global"
    rounds: int = 100

    def __post_init__(self) -> None:
        require(self.rounds >= 1, f"rounds={self.rounds} must be at least 1.")

    @property
    def steps(self) -> int:
        return self.rounds

    def score(
        self,
        model: nn.Module,
        names: Sequence[str],
        input_shape: tuple[int, ...],
        losses: Sequence[LossOf],
        draw: torch.Generator,
    ) -> dict[str, Tensor]:
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if isinstance(child, _NEUTRALISED):
                    setattr(parent, name, nn.Identity())
        model.double().eval()
        with torch.no_grad():
            for layer in model.modules():
                if isinstance(getattr(layer, "bias", None), nn.Parameter):
                    layer.bias.zero_()  # type: ignore[operator]
            for parameter in model.parameters():
                parameter.abs_()
        weights = weights_of(model, names)
        values = list(weights.values())
        outputs = model(torch.ones(1, *input_shape, dtype=torch.float64, device=values[0].device))
        gradients = torch.autograd.grad(outputs.sum(), values)
        return {
            name: weight.detach() * gradient.abs()
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
        }
