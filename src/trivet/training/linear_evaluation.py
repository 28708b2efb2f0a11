"""Linear evaluation: only the head of a network learns, on features that stay as they are."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from trivet.errors import require
from trivet.methods import method
from trivet.models.taps import last_linear
from trivet.training.fit import Fit
from trivet.training.stage import Checkpoint, Context


class _HeadOnly(nn.Module):
    """A network whose body stays in eval mode: no BatchNorm takes statistics, no dropout draws."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def train(self, mode: bool = True) -> _HeadOnly:
        self.training = mode
        self.model.eval()
        last_linear(self.model).train(mode)
        return self

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return logits


@method(title="Linear evaluation")
@dataclass(frozen=True)
class LinearEvaluation(Fit):
    """`fit` for the last linear layer alone, with all settings of `fit` but two; every other tensor stays bit by bit.

    What a frozen body is worth to another task. BatchNorm normalises by the statistics it came with and keeps them;
    dropout in the body is off. `compression` and `average` are refused: they act on the whole network.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for setting in ("compression", "average"):
            value = getattr(self, setting)
            require(value is None, f"{setting}={value} acts on the whole network, where only the head learns.")

    def run(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        model = checkpoint.model
        learnt = {id(tensor) for tensor in last_linear(model).parameters()}
        learns = {parameter: parameter.requires_grad for parameter in model.parameters()}
        for parameter in learns:
            parameter.requires_grad_(id(parameter) in learnt)
        try:
            after = super().run(replace(checkpoint, model=_HeadOnly(model)), context)
        finally:
            for parameter, before in learns.items():
                parameter.requires_grad_(before)
        *earlier, record = after.history
        return replace(after, model=model, history=[*earlier, {**record, "stage": "linear_evaluation"}])
