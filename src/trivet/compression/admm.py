"""ADMM: weights are drawn, step by step, to the nearest ones of an allowed kind (Zhang et al., ECCV 2018)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trivet.compression.compression import Compression, Moment, WeightMap, given, originals, replace_last, steps_on
from trivet.compression.masks import Mask, Masks
from trivet.compression.projection import Projection
from trivet.errors import require
from trivet.methods import method

WIDE_GAP = 0.1
"""A relative distance between weights and their copies above which the hard projection is likely to cost accuracy."""


class SplitWeight(WeightMap):
    """w itself, beside its allowed copy z, the scaled dual u, and the penalty's present rho.

    Attributes:
        shipping: whether to give the projection of w instead: what the weight would be if training ended now.
    """

    z: Tensor
    u: Tensor
    rho: Tensor

    def __init__(self, weight: Tensor, projection: Projection) -> None:
        super().__init__()
        self.projection, self.shipping = projection, False
        self.register_buffer("z", torch.zeros_like(weight))
        self.register_buffer("u", torch.zeros_like(weight))
        self.register_buffer("rho", torch.zeros((), device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return self.projection.project(weight.detach()) if self.shipping else weight

    def gap(self, weight: Tensor) -> float:
        """|| w - z || / || z ||, which is zero where ADMM has converged."""
        return float((weight - self.z).norm() / self.z.norm().clamp_min(torch.finfo(weight.dtype).tiny))


@method(title="ADMM", paper="Zhang et al., ECCV 2018; Ye et al., ICCV 2019", year=2018, legs="robust small")
@dataclass(frozen=True, kw_only=True)
class Admm(Compression):
    """Train under a growing pull towards allowed weights, then set each layer to the nearest allowed ones.

        min over W of L(W) + sum over layers of rho/2 || W - Z + U ||^2,  and every `period` epochs:
        rho <- growth * rho,   Z <- P(W + U),   U <- U + W - Z;       at the start Z = P(W), U = 0

    P is the `projection`. The penalty sees weights alone: under DP-SGD it costs no privacy. Under a robust objective,
    followed by a `fit` that trains what is left, this is Adv-ADMM (Ye et al.); zeros of P stay zeros in that stage,
    and its other weights are free. As in those authors' code, U is not rescaled when rho grows. They also start the
    learning rate anew with each Z; here the stage's schedule runs once.

    The problem is not convex and nothing is promised. If rho is small beside the curvature of the loss, the duals grow
    and Z never settles. The stage's record holds the largest || W - Z || / || Z || of a layer at the end as `admm_gap`,
    with a warning above 0.1: held-out accuracy is that of P(W), never that of W.

    Attributes:
        projection: what is allowed; weights that earlier masks hold at zero must stay zero in it.
        rho: the weight of the penalty at the start.
        growth: its factor at each update of Z.
        period: epochs between these updates.
    """

    projection: Projection
    rho: float = 1e-3
    growth: float = 1.3
    period: int = 1

    def __post_init__(self) -> None:
        require(0 < self.rho < float("inf"), f"rho={self.rho} must be positive and finite.")
        require(1 <= self.growth < float("inf"), f"growth={self.growth} must be at least 1 and finite.")
        require(self.period >= 1, f"period={self.period} must be at least 1.")

    def map_for(self, name: str, layer: nn.Module) -> WeightMap:
        require(
            all(isinstance(step, Mask) for step in steps_on(layer)),
            f"the weight of {name} is computed from others, which a projection cannot be written back to; add "
            f"{name!r} to exclude.",
        )
        return SplitWeight(layer.weight.detach(), self.projection)  # type: ignore[operator]

    @torch.no_grad()
    def initialise(self, model: nn.Module) -> None:
        for layer, each in self._split(model):
            each.z.copy_(self.projection.project(given(layer)))
            each.u.zero_()
            each.rho.fill_(self.rho)

    @torch.no_grad()
    def before(self, model: nn.Module, moment: Moment) -> None:
        if not moment.starts_epoch or moment.epoch == 0 or moment.epoch % self.period:
            return
        for layer, each in self._split(model):
            weight = given(layer)
            each.rho.mul_(self.growth)
            each.z.copy_(self.projection.project(weight + each.u))
            each.u.add_(weight - each.z)

    def adjust(self, model: nn.Module, moment: Moment) -> None:
        for layer, each in self._split(model):
            (stored,) = originals(layer)
            if not stored.requires_grad:
                continue
            with torch.enable_grad():
                weight = given(layer)
                pull = each.rho * (weight.detach() - each.z + each.u)
                (gradient,) = torch.autograd.grad(weight, stored, pull)
            stored.grad = gradient if stored.grad is None else stored.grad + gradient

    @contextmanager
    def as_shipped(self, model: nn.Module) -> Iterator[None]:
        maps = list(self.maps(model).values())
        for each in maps:
            each.shipping = True
        try:
            yield
        finally:
            for each in maps:
                each.shipping = False

    def gaps(self, model: nn.Module) -> dict[str, float]:
        """|| W - Z || / || Z || of each layer."""
        layers = self.layers(model)
        return {name: each.gap(given(layers[name]).detach()) for name, each in self.maps(model).items()}

    def report(self, model: nn.Module) -> dict[str, Any]:
        gaps = self.gaps(model)
        widest = max(gaps, key=lambda name: gaps[name])
        found: dict[str, Any] = {"admm_gap": gaps[widest]}
        if gaps[widest] > WIDE_GAP:
            found["warning"] = (
                f"ADMM has not converged: the weights of {widest} differ from allowed ones by {gaps[widest]:.2g} of "
                "their norm; raise rho or growth, or train for longer."
            )
        return found

    @torch.no_grad()
    def end(self, model: nn.Module) -> Compression:
        for layer, _ in self._split(model):
            allowed = self.projection.project(given(layer))
            (stored,) = originals(layer)
            stored.copy_(allowed)
            replace_last(layer, Mask(allowed != 0))
        return Masks(include=self.include, exclude=self.exclude)

    def _split(self, model: nn.Module) -> list[tuple[nn.Module, Any]]:
        layers = self.layers(model)
        return [(layers[name], each) for name, each in self.maps(model).items()]
