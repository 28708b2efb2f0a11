"""The noise layer of PixelDP (Lecuyer et al., IEEE S&P 2019): fresh noise inside a network, in training and at test."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from trivet.errors import require

Law = Literal["gaussian", "laplace"]


class NoiseLayer(nn.Module):
    """x + noise, drawn anew for every record in every forward pass, in training and in eval mode alike.

    N(0, s^2), or Laplace of density exp(-|t| / s) / 2s, independently in every coordinate. The draws come from
    PyTorch's global stream, as Dropout's do, and depend on no record: private gradients stay isolated. `scales`, a
    buffer, holds s: one number, or one for each channel [C, 1, 1].

    Noise that is drawn once and kept, or shrunk at test time, is another mechanism, about which nothing is proved.

    Raises:
        BadValue: scales that are not positive and finite, or of another shape.
    """

    scales: Tensor

    def __init__(self, law: Law, scales: float | Tensor) -> None:
        super().__init__()
        require(law in ("gaussian", "laplace"), f"law={law!r} must be 'gaussian' or 'laplace'.")
        self.law = law
        self.register_buffer("scales", torch.as_tensor(scales, dtype=torch.float32).clone())
        self.require_noise()

    def require_noise(self) -> None:
        """Refuse scales that are no noise; weights that were loaded may have brought any."""
        shape = tuple(self.scales.shape)
        require(
            not shape or (len(shape) == 3 and shape[1:] == (1, 1)),
            f"scales must be one number or one for each channel [C, 1, 1], got {shape}.",
        )
        # Written so that NaN, which compares false with everything, is refused too.
        sound = bool(((self.scales > 0) & (self.scales < torch.inf)).all())
        require(sound, f"scales={self.scales.flatten().tolist()} must be positive and finite.")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.draw(x)

    def draw(self, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Noise of the shape, type and device of `like` [B, ...]; from the global stream if `generator` is None."""
        if self.law == "gaussian":
            return self.scales * _normal(like, generator)
        # The difference of two exponentials; 1 - u lies in (0, 1], so that no logarithm is infinite.
        first, second = (-torch.log1p(-_uniform(like, generator)) for _ in range(2))
        return self.scales * (first - second)

    def extra_repr(self) -> str:
        return f"{self.law}, scales={self.scales.flatten().tolist()}"


class NoisyNetwork(nn.Module):
    """after(noise(before(x))): what a sampling certifier needs to know of a network with noise inside.

    `before` is what bounds the sensitivity; everything in `after` is post-processing of a noisy release.
    [B, C, H, W] in [0, 1] to logits [B, K], different in every pass. The classifier to deploy is the average answer.
    """

    def __init__(self, before: nn.Sequential, noise: NoiseLayer, after: nn.Sequential) -> None:
        super().__init__()
        self.before, self.noise, self.after = before, noise, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.noise(self.before(x)))


def _normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    if generator is None:  # contiguous: a channels-last image must not draw other numbers
        return torch.randn_like(like, memory_format=torch.contiguous_format)
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def _uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    if generator is None:
        return torch.rand_like(like, memory_format=torch.contiguous_format)
    return torch.rand(like.shape, generator=generator, dtype=like.dtype, device=like.device)
