"""The two-layer network with smoothed ReLUs on patches, of feature-learning theory (Li & Li, ICLR 2025)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from trivet.errors import require
from trivet.methods import method
from trivet.models.inputs import require_fit
from trivet.models.normalize import normalization


class SmoothedReLU(nn.Module):
    """0 for z <= 0;  z^q / (q rho^(q-1)) up to rho;  z - (1 - 1/q) rho beyond: continuous, and so is its derivative.

    The polynomial makes small alignments grow slowly and large ones fast: the race between features that the theory
    is about.
    """

    def __init__(self, q: float, rho: float) -> None:
        super().__init__()
        self.q, self.rho = q, rho

    def forward(self, z: Tensor) -> Tensor:
        z = z.relu()
        bent = z.clamp(max=self.rho)
        return bent**self.q / (self.q * self.rho ** (self.q - 1)) + (z - bent)

    def extra_repr(self) -> str:
        return f"q={self.q}, rho={self.rho}"


class _SumByClass(nn.Module):
    """[B, C, H, K m] to [B, K]: over all patches, and over the m filters of each class."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, z: Tensor) -> Tensor:
        return z.unflatten(-1, (self.classes, -1)).sum((1, 2, 4))


class PatchNetwork(nn.Sequential):
    """F_i(X) = sum_{r <= m} sum_p act(<w_{i,r}, x_p>); see `patch_network`."""

    @property
    def banks(self) -> Tensor:
        """The filters w [K, m, d]."""
        weight = cast(nn.Linear, self.get_submodule("filters")).weight
        return weight.unflatten(0, (cast(_SumByClass, self.get_submodule("sum")).classes, -1))


@method(title="Two-layer patch network", paper="Li & Li, ICLR 2025", year=2025)
def patch_network(
    input_shape: tuple[int, int, int],
    num_classes: int,
    filters: int = 12,
    q: float = 3.0,
    rho: float = 0.2,
    spread: float = 0.02,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    generator: torch.Generator | None = None,
) -> PatchNetwork:
    """F_i(X) = sum_{r <= m} sum_p act(<w_{i,r}, x_p>), one bank of m filters for each class, no bias: [B, C, H, W] to
    [B, K]. The patches x_p are the rows of the image, C H of them with W values each; act is `SmoothedReLU`.

    The patch data wants mean [0.5] and std [0.125], which undo its scaling. With few filters (4) a class can go
    unlearned: its logit stays 0, and it becomes the answer to whatever the others reject.

    Args:
        filters: m, of each class.
        q: power of the activation near 0; the theory wants at least 3.
        rho: where the activation turns linear.
        spread: standard deviation of the first weights, N(0, spread^2).
    """
    require_fit("patch_network", input_shape, num_classes)
    require(filters >= 1, f"filters={filters} must be at least 1.")
    require(q > 1, f"q={q} must be greater than 1.")
    require(rho > 0, f"rho={rho} must be positive.")
    require(spread > 0, f"spread={spread} must be positive.")
    layers: OrderedDict[str, nn.Module] = OrderedDict(normalize=normalization(input_shape[0], mean, std))
    linear = nn.Linear(input_shape[2], num_classes * filters, bias=False)
    with torch.no_grad():
        linear.weight.normal_(std=spread, generator=generator)
    layers["filters"], layers["activation"], layers["sum"] = linear, SmoothedReLU(q, rho), _SumByClass(num_classes)
    return PatchNetwork(layers)
