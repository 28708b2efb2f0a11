"""How far the output of the first layers can move when the input moves by one: exact or from above, never below.

The l2 bound of a convolution is that of PixelDP (Lecuyer et al., IEEE S&P 2019); its l1 bounds are refined by stride:
an input pixel meets only the taps of its own phase.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trivet.errors import BadValue, require
from trivet.models.normalize import Normalize

Norm = Literal["L1", "L2"]


def kernel_sensitivity(weight: Tensor, stride: Sequence[int], attack: Norm, noise: Norm) -> Tensor:
    """sup ||conv(d)||_noise over ||d||_attack <= 1, for a kernel `weight` [O, C, kh, kw] and zero padding of any width.

    L1 to L1 and L1 to L2: the largest column norm of the convolution as a matrix, over input channels and phases;
    exact where the image is as large as the kernel. L2 to L2: ||weight as [O, C kh kw]||_2 times
    sqrt(ceil(kh / stride) ceil(kw / stride)), because a pixel enters at most that square of patches; exact for patches
    that do not overlap, above the truth otherwise. Differentiable in `weight`.
    """
    require(attack == "L1" or noise == "L2", "an L2 attack moves the L1 norm by a factor that grows with the layer.")
    repeats = [-(-side // step) for side, step in zip(weight.shape[2:], stride, strict=True)]
    if attack == "L2":
        return math.sqrt(math.prod(repeats)) * torch.linalg.matrix_norm(weight.flatten(1), 2)
    missing = [step * count - side for side, step, count in zip(weight.shape[2:], stride, repeats, strict=True)]
    taps = F.pad(weight, (0, missing[1], 0, missing[0]))
    taps = taps.unflatten(3, (repeats[1], stride[1])).unflatten(2, (repeats[0], stride[0]))  # [O, C, rh, sh, rw, sw]
    return torch.linalg.vector_norm(taps, 1 if noise == "L1" else 2, dim=(0, 2, 4)).max()


def sensitivity(before: nn.Sequential, attack: Norm, noise: Norm, scales: Tensor | None = None) -> float:
    """A bound on ||D^-1 (before(x) - before(x'))||_noise over ||x - x'||_attack <= 1, in float64.

    D is the diagonal of `scales` (one number, or one for each output channel; 1 if None). The bounds of the layers
    are multiplied; the one of the last linear layer contains D^-1.

    Raises:
        BadValue: layers other than convolutions, linear layers, `Normalize` and ReLU.
    """
    linear = [layer for layer in before if isinstance(layer, (nn.Conv2d, nn.Linear))]
    inverse = torch.ones(1, dtype=torch.float64) if scales is None else 1 / scales.detach().double().flatten().cpu()
    total, norm = 1.0, attack
    for layer in before:
        if isinstance(layer, Normalize):
            total /= float(layer.std.double().min())
        elif isinstance(layer, (nn.Conv2d, nn.Linear)):
            weight, stride = _kernel(layer)
            if layer is linear[-1]:
                weight = weight * inverse.view(-1, 1, 1, 1)
            total *= float(kernel_sensitivity(weight, stride, norm, noise))
            norm = noise
        elif not isinstance(layer, (nn.Identity, nn.ReLU, nn.Flatten)):
            raise BadValue(
                f"before the noise stands a {type(layer).__name__}, whose sensitivity is not known; only convolutions, "
                "linear layers, Normalize and ReLU may stand there."
            )
    if not linear:
        total *= float(inverse.max())
    return total * (1 + 1e-9)  # more than the rounding of a singular value


def _kernel(layer: nn.Conv2d | nn.Linear) -> tuple[Tensor, tuple[int, ...]]:
    """The weight [O, C, kh, kw] float64 on the CPU, and the stride; a linear layer is a 1x1 convolution."""
    weight = layer.weight.detach().double().cpu()
    if isinstance(layer, nn.Linear):
        return weight[:, :, None, None], (1, 1)
    plain = layer.groups == 1 and set(layer.dilation) == {1} and layer.padding_mode == "zeros"
    require(plain, "before the noise, convolutions must have groups=1, dilation=1 and padding_mode='zeros'.")
    return weight, layer.stride


class UnitSensitivity(nn.Module):
    """A parametrization: the kernel divided by its sensitivity, so that the layers up to it have sensitivity 1.

    The published code keeps l2 sensitivities near 1 by ten Parseval steps W <- (1 + s) W - s W W^T W, s = 0.0003,
    after each optimiser step. Dividing by the exact number needs no hook in the loop, holds at every step instead of
    nearly, and is a function of the weights alone, so that private gradients stay gradients of one record.

    Args:
        stride: of the convolution.
        attack, noise: the norms of the change and of the noise.
        shares: [O], the relative scale of the noise on each output channel.
        gain: sensitivity of what stands before the convolution.
    """

    shares: Tensor

    def __init__(self, stride: Sequence[int], attack: Norm, noise: Norm, shares: Tensor, gain: float) -> None:
        super().__init__()
        self.stride, self.attack, self.noise, self.gain = tuple(stride), attack, noise, gain
        self.register_buffer("shares", shares.view(-1, 1, 1, 1), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        found = kernel_sensitivity(weight / self.shares, self.stride, self.attack, self.noise)
        return weight / (self.gain * found)
