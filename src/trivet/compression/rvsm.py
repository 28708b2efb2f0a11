"""RVSM and RGSM: sparsity of weights or channels by relaxed splitting (Dinh, Wang, Bertozzi, Osher & Xin, 2020)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import sqrt
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trivet.compression.compression import Compression, Moment, WeightMap, originals, replace_last
from trivet.compression.masks import Mask, Masks
from trivet.errors import require
from trivet.methods import method

Groups = Literal["weights", "channels"]


class Split(WeightMap):
    """w while it trains; `shadow` is u, which is deployed."""

    shadow: Tensor

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.register_buffer("shadow", torch.zeros(shape))

    def forward(self, weight: Tensor) -> Tensor:
        return weight


@method(
    title="RVSM and RGSM",
    paper="Dinh, Wang, Bertozzi, Osher & Xin, 2020",
    year=2020,
    legs="small",
)
@dataclass(frozen=True, kw_only=True)
class Rvsm(Compression):
    """min over w, u of f(w) + (beta / 2) ||w - u||^2 + penalty(u): no multiplier, unlike ADMM.

        w <- w - lr (grad f(w) + beta (w - u)),  then
        weights (RVSM):   penalty = lam ||u||_0:               u = w where |w| > sqrt(2 lam / beta), else 0
        channels (RGSM):  penalty = lam #{g : u_g != 0}:        u_g = w_g where ||w_g||_2 > sqrt(2 lam), else 0

    A channel g is what a convolution reads of one input channel, W[:, c]. For channels w has a term of its own,
    lam2 sum_g ||w_g||_2. After training u is the network: the zeros stay as masks. Held-out records are judged at u.

    Promises convergence of the splitting's energy for lr < 2 / (beta + L), L the Lipschitz constant of the gradient,
    which nobody knows; no certificate of robustness.

    Attributes:
        groups: "weights" (RVSM) or "channels" (RGSM).
        beta: the strength of the tie between w and u; 1 for channels, 0.01 to 0.5 for weights in the paper.
        lam: the price of a weight or a channel; the paper's 1e-6 and 1e-2 to 1e-1.
        lam2: the price of the norms of channels; 1e-5 in the paper, unused for weights.
    """

    groups: Groups = "channels"
    beta: float = 1.0
    lam: float = 5e-2
    lam2: float = 1e-5

    def __post_init__(self) -> None:
        require(self.groups in ("weights", "channels"), f"groups={self.groups!r} must be 'weights' or 'channels'.")
        for name in ("beta", "lam"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive.")
        require(self.lam2 >= 0, f"lam2={self.lam2} must not be negative.")

    def map_for(self, name: str, layer: nn.Module) -> WeightMap:
        weight: Any = layer.weight
        return Split(weight.shape)

    @torch.no_grad()
    def initialise(self, model: nn.Module) -> None:
        self._threshold(model)

    @torch.no_grad()
    def adjust(self, model: nn.Module, moment: Moment) -> None:
        for weight, split in self._pairs(model):
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            weight.grad.add_(weight - split.shadow, alpha=self.beta)
            if self.groups == "channels" and self.lam2:
                weight.grad.add_(weight / _norms(weight).clamp_min(1e-12), alpha=self.lam2)

    @torch.no_grad()
    def after(self, model: nn.Module, moment: Moment) -> None:
        self._threshold(model)

    def _threshold(self, model: nn.Module) -> None:
        for weight, split in self._pairs(model):
            size, edge = (weight.abs(), sqrt(2 * self.lam / self.beta))
            if self.groups == "channels":
                size, edge = _norms(weight), sqrt(2 * self.lam)
            split.shadow.copy_(weight * (size > edge))

    def _pairs(self, model: nn.Module) -> Iterator[tuple[nn.Parameter, Split]]:
        layers: dict[str, Any] = self.layers(model)
        for name, split in self.maps(model).items():
            yield layers[name].parametrizations.weight.original, split

    @contextmanager
    def as_shipped(self, model: nn.Module) -> Iterator[None]:
        kept = [weight.detach().clone() for weight, _ in self._pairs(model)]
        with torch.no_grad():
            for weight, split in self._pairs(model):
                weight.copy_(split.shadow)
        try:
            yield
        finally:
            with torch.no_grad():
                for (weight, _), before in zip(self._pairs(model), kept, strict=True):
                    weight.copy_(before)

    @torch.no_grad()
    def end(self, model: nn.Module) -> Compression:
        layers = self.layers(model)
        for name, split in self.maps(model).items():
            (stored,) = originals(layers[name])
            stored.copy_(split.shadow)
            replace_last(layers[name], Mask(split.shadow != 0))
        return Masks(include=self.include, exclude=self.exclude)


def _norms(weight: Tensor) -> Tensor:
    """The l2 norm of what a layer reads of each input channel, in the shape of the weight."""
    kept = (0, *range(2, weight.ndim))
    return weight.square().sum(kept, keepdim=True).sqrt().expand_as(weight)
