"""Binary-Relax: weights are drawn towards a grid, then put on it (Yin, Zhang, Lyu, Osher, Qi & Xin, 2018)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trivet.compression.binary import Binary
from trivet.compression.compression import Compression, Moment, WeightMap, given
from trivet.compression.projection import Projection
from trivet.errors import require
from trivet.methods import method


class Relaxed(WeightMap):
    """u = (w + eta Q(w)) / (1 + eta), and Q(w) at eta = infinity; the gradient by u is taken as the one by w."""

    eta: Tensor

    def __init__(self, projection: Projection) -> None:
        super().__init__()
        self.projection = projection
        self.register_buffer("eta", torch.tensor(torch.inf))

    def forward(self, weight: Tensor) -> Tensor:
        hard = self.projection.project(weight)
        # At infinity the weight's share is 0; written as a share, so that no infinity is divided by another.
        share = 1 / (1 + self.eta)
        used = torch.where(self.eta.isinf(), hard, share * weight.detach() + (1 - share) * hard)
        return used + (weight - weight.detach())  # the bracket is exactly zero, and has a gradient


@method(
    title="Binary-Relax",
    paper="Yin et al., SIAM J. Imaging Sciences 2018; robust networks: Li, Wang & Xin, 2020",
    year=2018,
    legs="small",
)
@dataclass(frozen=True, kw_only=True)
class BinaryRelax(Compression):
    """Minimise f(u) over quantised u, by minimising f(w) + (lambda / 2) dist(w, Q)^2 with a growing lambda.

        phase I:   forward and backward at u = (w + eta Q(w)) / (1 + eta), the step on w; eta <- gamma eta every epoch
        phase II:  from the share `switch` of training on, u = Q(w)

    u is the exact solution of the proximal problem of the relaxed term. With `switch=0` this is BinaryConnect
    (Courbariaux et al., 2015). Weight decay belongs to w, and there it is. Normalisation layers and biases stay
    floats. Held-out records are judged at Q(w), never at u.

    No certificate: the papers prove convergence under a condition that cannot be checked. Quantised networks have small
    input gradients, which weakens attacks on cross-entropy without making the network robust; audit with attacks that
    scale the logits, and with transfer from the float twin.

    Attributes:
        projection: Q, layer by layer: `binary`, `ternary`, `m_bit`.
        gamma: growth of eta, which begins at 1, per epoch; 1.05 over 200 epochs in the papers, and more for fewer.
        switch: the share of training after which the weights lie on the grid; the papers have 0.6 and 0.75.
    """

    projection: Projection = field(default_factory=Binary)
    gamma: float = 1.05
    switch: float = 0.6

    def __post_init__(self) -> None:
        require(self.gamma >= 1, f"gamma={self.gamma} must be at least 1.")
        require(0 <= self.switch < 1, f"switch={self.switch} must lie in [0, 1).")

    def map_for(self, name: str, layer: nn.Module) -> WeightMap:
        return Relaxed(self.projection)

    def before(self, model: nn.Module, moment: Moment) -> None:
        relaxing = moment.fraction < self.switch
        # Beyond 1e30 a float32 eta would be infinite, and the share of w is nothing already.
        eta = min(self.gamma**moment.epoch, 1e30) if relaxing else torch.inf
        for each in self.maps(model).values():
            each.eta.fill_(eta)

    @contextmanager
    def as_shipped(self, model: nn.Module) -> Iterator[None]:
        maps = self.maps(model).values()
        kept = [each.eta.item() for each in maps]
        self._harden(model)
        try:
            yield
        finally:
            for each, eta in zip(maps, kept, strict=True):
                each.eta.fill_(eta)

    def distances(self, model: nn.Module) -> dict[str, float]:
        """How far each layer's own weights are from the grid, ||w - Q(w)|| / ||w||."""
        layers: dict[str, Any] = self.layers(model)
        with torch.no_grad():
            weights = {name: given(layer) for name, layer in layers.items()}
            return {name: float((w - self.projection.project(w)).norm() / w.norm()) for name, w in weights.items()}

    def report(self, model: nn.Module) -> dict[str, Any]:
        return {"distance_to_grid": self.distances(model)}

    def end(self, model: nn.Module) -> Compression:
        self._harden(model)
        return self

    def _harden(self, model: nn.Module) -> None:
        for each in self.maps(model).values():
            each.eta.fill_(torch.inf)
