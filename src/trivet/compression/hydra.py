"""HYDRA: which weights matter is learnt by the robust objective itself (Sehwag, Wang, Mittal, Jana, NeurIPS 2020)."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import sqrt
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from trivet.compression.compression import WEIGHTED, Compression, WeightMap, given, originals, replace_last
from trivet.compression.masks import Mask, Masks
from trivet.compression.pattern import Pattern
from trivet.compression.unstructured import Unstructured
from trivet.errors import require
from trivet.methods import method


class ScoredMask(WeightMap):
    """w * m, where m keeps the weights with the largest |s|; while it learns, the gradient passes m as if it were |s|.

    With g = d loss / d (w m) the scores get g * w * sign(s).
    """

    def __init__(self, shape: torch.Size, pattern: Pattern, density: float) -> None:
        super().__init__()
        self.pattern, self.density = pattern, density
        self.scores = nn.Parameter(torch.ones(shape), requires_grad=False)

    @property
    def mask(self) -> Tensor:
        return self.pattern.keep(self.scores.detach().abs(), self.density)

    def forward(self, weight: Tensor) -> Tensor:
        importance = self.scores.abs()
        return weight * (self.mask + (importance - importance.detach()))  # the bracket is zero, and has a gradient


@method(title="HYDRA", paper="Sehwag et al., NeurIPS 2020", year=2020, legs="robust small")
@dataclass(frozen=True, kw_only=True)
class Hydra(Compression):
    """Learn importance scores under the stage's objective, weights frozen; then keep the share `density` of each layer.

        min over S of L(theta * top(|S|)),   S starts at sqrt(6 / fan_in) * W / max|W|   (layer by layer)

    Three stages make the paper's method: `fit` (train), `fit` with this (prune), `fit` (fine-tune). At the start the
    mask is that of the largest weights; with scores that do not learn, this is pruning by magnitude. Normalisation
    layers go on learning, as in the authors' code. Weight decay acts on the scores.

    Nothing here sees a record: the scores are trained by the stage's objective and gradient rule. Under DP-SGD they are
    private, and their budget composes with that of the other stages.

    Promises nothing of its own. Published on CIFAR-10 (VGG-16, PGD-50, 99 % dropped): 41.7 % against 34.3 % of
    magnitude pruning; at 90 % it is 49.5 against 48.8. AutoAttack is some five points below such figures.

    Attributes:
        density: the share of weights each layer keeps, in (0, 1].
        pattern: what is kept or dropped together.
        scores: how they start: "scaled" weights, or "random" (Kaiming uniform), the ablation that is known to fail.
    """

    density: float = 0.1
    pattern: Pattern = field(default_factory=Unstructured)
    scores: Literal["scaled", "random"] = "scaled"

    def __post_init__(self) -> None:
        require(0 < self.density <= 1, f"density={self.density} must lie in (0, 1].")

    def map_for(self, name: str, layer: nn.Module) -> WeightMap:
        weight: Any = layer.weight
        return ScoredMask(weight.shape, self.pattern, self.density)

    def begin(self, model: nn.Module) -> None:
        _train_weights(model, False)
        for each in self.maps(model).values():
            each.scores.requires_grad_(True)

    @torch.no_grad()
    def initialise(self, model: nn.Module) -> None:
        layers = self.layers(model)
        for name, each in self.maps(model).items():
            weight = given(layers[name])
            if self.scores == "random":
                nn.init.kaiming_uniform_(each.scores, a=sqrt(5))
            else:
                fan_in = weight[0].numel()
                each.scores.copy_(sqrt(6 / fan_in) * weight / weight.abs().max().clamp_min(torch.finfo().tiny))

    def report(self, model: nn.Module) -> dict[str, Any]:
        return {"kept": {name: int(each.mask.sum()) for name, each in self.maps(model).items()}}

    def end(self, model: nn.Module) -> Compression:
        layers = self.layers(model)
        for name, each in self.maps(model).items():
            replace_last(layers[name], Mask(each.mask))
        _train_weights(model, True)
        return Masks(include=self.include, exclude=self.exclude)


def _train_weights(model: nn.Module, learn: bool) -> None:
    for layer in model.modules():
        if issubclass(parametrize.type_before_parametrizations(layer), WEIGHTED):
            for tensor in (*originals(layer), *originals(layer, "bias")):
                if isinstance(tensor, nn.Parameter):
                    tensor.requires_grad_(learn)
