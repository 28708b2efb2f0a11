"""PGD on scaled logits, for networks whose input gradients vanish (Gupta & Ajanthan, 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from trivet.errors import require
from trivet.methods import method
from trivet.models.foreign.quantized import Quantize
from trivet.threats.attack import Attack, Target
from trivet.threats.losses import cross_entropy
from trivet.threats.pgd import ascend
from trivet.threats.rotation_translation import balls
from trivet.threats.threat import ThreatModel

_LEVELS = 256


@method(title="Logit-scaled PGD", paper="Gupta & Ajanthan, AAAI 2022", year=2022, legs="robust")
@dataclass(frozen=True)
class LogitScaledPGD(Attack):
    """PGD on the cross-entropy of T z(x), for every T of `temperatures`; the class does not change, the gradient does.

    Large logits saturate the softmax, and the gradient of the cross-entropy is lost in float32: quantised networks then
    look robust. Their logits divided by a hundred have gradients again; small logits are multiplied. Each T attacks
    what the others have left. The paper chooses one T from the logits or the Jacobian; the worst of a grid is at least
    as strong, and dearer.

    Attributes:
        steps, step_size, samples: as for PGD.
        temperatures: the factors T.
    """

    steps: int = 20
    step_size: float | None = None
    samples: int = 1
    temperatures: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0, 100.0)

    def __post_init__(self) -> None:
        require(self.steps >= 1, f"steps={self.steps} must be at least 1.")
        require(self.samples >= 1, f"samples={self.samples} must be at least 1.")
        require(
            bool(self.temperatures) and all(0 < t < float("inf") for t in self.temperatures),
            f"temperatures={list(self.temperatures)} must be positive and finite, and at least one.",
        )

    def search(self, model: Target, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        step_size = 2.5 * self.threat.eps / self.steps if self.step_size is None else self.step_size
        best, open_ = x.clone(), torch.arange(len(x), device=x.device)
        for temperature in self.temperatures:
            clean, labels = x[open_], y[open_]
            best[open_] = ascend(
                model,
                clean,
                self.threat.random_start(clean, generator),
                partial(_scaled_loss, labels, temperature),
                threat=self.threat,
                steps=self.steps,
                step_size=step_size,
                samples=self.samples,
            )
            open_ = open_[~model.misclassifies(best[open_], labels)]
            if not len(open_):
                break
        return best


def _scaled_loss(labels: Tensor, temperature: float, logits: Tensor) -> Tensor:
    return cross_entropy(temperature * logits, labels)


def quantized_battery(model: nn.Module, threat: ThreatModel, samples: int = 1) -> tuple[Attack, ...]:
    """What no report on a quantised network may leave out: scaled logits, on each part of `threat`. Else empty.

    Quantised is what rounds its activations, or has a layer whose non-zero weights share 256 values or fewer.
    """
    weights = [weight for each in model.modules() if isinstance(weight := getattr(each, "weight", None), Tensor)]
    rounds = any(isinstance(each, Quantize) for each in model.modules())
    if not rounds and not any(_on_levels(weight) for weight in weights if weight.ndim > 1):
        return ()
    return tuple(LogitScaledPGD(each, samples=samples) for each in balls(threat))


def _on_levels(weight: Tensor) -> bool:
    values = weight.detach()
    values = values[values != 0]
    levels = len(values.unique())
    return 0 < levels <= _LEVELS and len(values) >= 2 * levels
