"""GraSP: keep the weights that carry the flow of gradients, at the start (Wang, Zhang & Grosse, ICLR 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from trivet.compression.pruner import LossOf, Pruner, mean_gradients, weights_of
from trivet.compression.scope import Scope
from trivet.errors import require
from trivet.methods import method


class Tempered(nn.Module):
    """Logits divided by a temperature."""

    def __init__(self, model: nn.Module, temperature: float) -> None:
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return logits / self.temperature


@method(title="GraSP", paper="Wang, Zhang & Grosse, ICLR 2020", year=2020, legs="small")
@dataclass(frozen=True)
class Grasp(Pruner):
    """score = w * (H g), where g is the gradient of the loss and H its Hessian; the largest are kept, over all layers.

    The authors' code stores -w * (H g) and removes the largest: the same order. As there, logits are divided by
    `temperature`, and linear layers are drawn anew (Xavier normal) before scoring, on the copy that is scored: the
    method is for networks that have not been trained. The objective must be one that can be differentiated twice.

    Attributes:
        temperature: what logits are divided by.
    """

    reads_records: ClassVar[bool] = True
    scope: ClassVar[Scope] = "global"
    temperature: float = 200.0

    def __post_init__(self) -> None:
        require(0 < self.temperature < float("inf"), f"temperature={self.temperature} must be positive and finite.")

    def score(
        self,
        model: nn.Module,
        names: Sequence[str],
        input_shape: tuple[int, ...],
        losses: Sequence[LossOf],
        draw: torch.Generator,
    ) -> dict[str, Tensor]:
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                drawn = nn.init.xavier_normal_(torch.empty(layer.weight.shape), generator=draw)
                layer.weight.data.copy_(drawn)
        tempered = Tempered(model, self.temperature)
        weights = weights_of(model, names)
        values = list(weights.values())
        gradient = mean_gradients(losses, tempered, values)
        product = [torch.zeros_like(weight) for weight in values]
        for loss in losses:
            flow = torch.autograd.grad(loss(tempered), values, create_graph=True)
            along = sum((g * each).sum() for g, each in zip(gradient, flow, strict=True))
            for total, part in zip(product, torch.autograd.grad(along, values), strict=True):  # type: ignore[arg-type]
                total += part / len(losses)
        return {name: weight.detach() * each for (name, weight), each in zip(weights.items(), product, strict=True)}
