"""EnResNet (Wang, Yuan, Shi & Osher, NeurIPS 2019): an ensemble of residual networks with noise in every block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from trivet.errors import require
from trivet.methods import method
from trivet.models.inputs import require_fit
from trivet.models.norms import Norm
from trivet.models.preact_resnet import PreActBlock, preact_network

Over = Literal["sample", "batch"]


class NoisyPreActBlock(PreActBlock):
    """r + noise std(r) xi with r the pre-activation block's output and xi ~ N(0, I), new in every pass.

    `over`: what the deviation, one number, is taken over; of the whole batch as in the authors' code, where an answer
    depends on its batch mates, or of each record.
    """

    noise: float = 0.1
    over: Over = "sample"

    def forward(self, x: Tensor) -> Tensor:
        r = super().forward(x)
        flat = r.flatten() if self.over == "batch" else r.flatten(1)
        # Not `std`, which warns of a batch without records.
        square = (flat - flat.mean(-1, keepdim=True)).square().sum(-1) / (flat.shape[-1] - 1)
        std = square.sqrt() if self.over == "batch" else square.sqrt()[:, None, None, None]
        return r + self.noise * std * torch.randn_like(r, memory_format=torch.contiguous_format)


class EnResNet(nn.Module):
    """The mean logits [B, K] of `members`, each a network with noise inside, over `draws` passes in eval mode."""

    def __init__(self, members: Sequence[nn.Module], draws: int) -> None:
        super().__init__()
        self.members, self.draws = nn.ModuleList(members), draws

    def forward(self, x: Tensor) -> Tensor:
        passes = 1 if self.training else self.draws
        return torch.stack([member(x) for member in self.members for _ in range(passes)]).mean(0)


@method(
    title="EnResNet",
    paper="Wang, Yuan, Shi & Osher, NeurIPS 2019",
    year=2019,
    legs="robust",
    note="randomised: robust figures need attacks that average over its draws (EOT)",
)
def en_resnet(
    input_shape: tuple[int, int, int],
    num_classes: int,
    members: int = 1,
    blocks: int = 3,
    channels: int = 16,
    noise: float = 0.1,
    over: Over = "sample",
    draws: int = 1,
    norm: Norm = "batch",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    generator: torch.Generator | None = None,
) -> EnResNet:
    """`members` pre-activation residual networks of three stages, channels, 2 channels and 4 channels wide.

    `blocks` per stage: 3 is the paper's ResNet-20, 5, 7, 9, 18 its ResNet-32, 44, 56, 110. The noise stays on in eval
    mode, as in the authors' code: answers are draws. A ResNet is an Euler step of a transport equation; noise adds a
    diffusion, whose solution the ensemble's mean approximates. That is a motive, not a certificate.
    Images [B, C, H, W] in [0, 1], in the paper without normalisation by `mean` and `std`. Logits [B, K].

    Args:
        noise: the deviation of the noise relative to that of the block's output; 0.1 in the paper. With 0 and one
            member this is a pre-activation ResNet.
        over: "sample", or "batch" to reproduce the authors' code; private training needs "sample".
        draws: passes averaged for one answer in eval mode.

    Raises:
        BadValue: sizes below one, negative noise.
    """
    require_fit("en_resnet", input_shape, num_classes)
    for name, value in (("members", members), ("blocks", blocks), ("channels", channels), ("draws", draws)):
        require(value >= 1, f"{name}={value} must be at least 1.")
    require(noise >= 0, f"noise={noise} must not be negative.")
    stages = [(blocks, channels), (blocks, 2 * channels), (blocks, 4 * channels)]

    def member() -> nn.Module:
        net = preact_network(
            input_shape, num_classes, channels, stages, norm, mean, std, generator, block=NoisyPreActBlock
        )
        for module in net.modules():
            if isinstance(module, NoisyPreActBlock):
                module.noise, module.over = noise, over
        return net

    return EnResNet([member() for _ in range(members)], draws)
