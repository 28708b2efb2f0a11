"""Wide residual networks (Zagoruyko & Komodakis, BMVC 2016)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from trivet.errors import require
from trivet.methods import method
from trivet.models.inputs import require_fit
from trivet.models.norms import Norm
from trivet.models.preact_resnet import preact_network


@method(title="Wide ResNet", paper="Zagoruyko & Komodakis, BMVC 2016", year=2016)
def wide_resnet(
    input_shape: tuple[int, int, int],
    num_classes: int,
    depth: int = 28,
    widen_factor: int = 10,
    norm: Norm = "batch",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    generator: torch.Generator | None = None,
) -> nn.Sequential:
    """WRN-`depth`-`widen_factor`: three stages of (depth - 4) / 6 pre-activation blocks, 16, 32 and 64 times as wide.

    The paper's B(3, 3) block without dropout. `norm="group"` is the network of private training (De et al. 2022);
    without `norm`, every block's second convolution starts at zero, as in `resnet`. [B, C, H, W] to [B, K].
    """
    require_fit("wide_resnet", input_shape, num_classes)
    require(depth >= 10 and depth % 6 == 4, f"depth={depth} must be 6n + 4, e.g. 16, 28, 34 or 40.")
    require(widen_factor >= 1, f"widen_factor={widen_factor} must be at least 1.")
    stages = [((depth - 4) // 6, channels * widen_factor) for channels in (16, 32, 64)]
    return preact_network(input_shape, num_classes, 16, stages, norm, mean, std, generator)
