"""Batch normalisation by public images: what SIDP (Davody et al., 2020) wanted, without mixing private records."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PublicBatchNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) per channel, with mean and variance of the public rows alone; no parameters.

    A record is normalised by public images and by nothing else, so its loss depends on no other private record, and
    clipping its gradient bounds what it contributes. The statistics are those of the present weights, in training
    and in eval mode alike: there are no running averages, and a batch of one gives the same logits.

    Attributes:
        mixed: take the statistics over private and public rows together, as SIDP's code does. Every loss then depends
            on every record of the batch: no privacy claim survives it, and private rules refuse it.
        spatial: inputs are maps [B, C, H, W], not vectors [B, C].
    """

    def __init__(self, *, spatial: bool, mixed: bool = False, eps: float = 1e-5) -> None:
        super().__init__()
        self.axes, self.mixed, self.eps = ((0, 2, 3) if spatial else (0,)), mixed, eps

    def forward(self, x: Tensor, public: Tensor) -> tuple[Tensor, Tensor]:
        """The rows [B, ...] and the public rows [A, ...], both normalised."""
        rows = torch.cat([x, public]) if self.mixed else public
        mean = rows.mean(self.axes, keepdim=True)
        scale = (rows.var(self.axes, correction=0, keepdim=True) + self.eps).rsqrt()
        return (x - mean) * scale, (public - mean) * scale

    def extra_repr(self) -> str:
        return f"axes={self.axes}, mixed={self.mixed}, eps={self.eps}"


class WithPublicRows(nn.Module):
    """A chain of layers through which the public images [A, C, H, W] run beside every batch, for their statistics.

    No gradient flows through the statistics of `PublicBatchNorm` (it does where they are mixed, as published): the
    public images price the present weights, they do not pull at them.
    """

    public: Tensor

    def __init__(self, layers: nn.Sequential, public: Tensor) -> None:
        super().__init__()
        self.layers = layers
        self.register_buffer("public", public)
        self.mixed = any(isinstance(layer, PublicBatchNorm) and layer.mixed for layer in layers)

    def forward(self, x: Tensor) -> Tensor:
        public = self.public
        for layer in self.layers:
            if isinstance(layer, PublicBatchNorm):
                x, public = layer(x, public)
            else:
                x = layer(x)
                with torch.set_grad_enabled(self.mixed and torch.is_grad_enabled()):
                    public = layer(public)
        return x
