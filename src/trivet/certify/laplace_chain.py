"""The radius of a classifier with Laplace noise on its input and on its first layer, as StoBatch's should have been.

Phan et al. (ICML 2020) add two reaches, kappa of the input noise and phi of the latent noise. That does not follow
from composition and is false: of two Lap(1) releases of a number x, each positive, the sum claims 2.962 at x = 3,
while the vote falls at 2.4652. What follows is here; "eps" is that of the two releases at a change of size r.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from trivet.certify.divergence_radius import laplace_reach
from trivet.errors import require
from trivet.models.sensitivity import sensitivity


def laplace_radius(
    p_lower: float,
    p_upper: float,
    *,
    input_sensitivity: float,
    input_scale: float,
    latent_sensitivity: float,
    latent_scale: float,
    passes: Literal["two", "serial"],
) -> float:
    """The largest r with p_lower >= exp(2 eps(r)) p_upper; 0 where p_lower <= p_upper.

        two:     eps(r) = r S_x / b_x + r S_h / b_h         # two passes, each with one of the noises, are combined
        serial:  eps(r) = min(r S_x / b_x, r S_h / b_h)     # x, noise, layer, noise, rest: either noise is enough

    The scores must be expectations of a function in [0, 1] under FRESH noise of the full scales; p_lower and p_upper
    must hold simultaneously for all classes. A radius of infinity is returned where nothing moves.

    Args:
        p_lower, p_upper: bounds on the top score and on the largest other one.
        input_sensitivity: S_x, L1 norm of the input's change per unit of r: d for Linf, 1 for L1.
        latent_sensitivity: S_h, L1 norm of the layer's change per unit of r: `latent_l1`.
        input_scale, latent_scale: b of each Laplace noise; infinity for a release that tells nothing, 0 for no noise.
        passes: how the two noises are used.

    Raises:
        BadValue: scales or sensitivities that are negative or not numbers.
    """
    for name, value in {"input_scale": input_scale, "latent_scale": latent_scale}.items():
        require(value >= 0, f"{name}={value} must not be negative.")
    for name, value in {"input_sensitivity": input_sensitivity, "latent_sensitivity": latent_sensitivity}.items():
        require(0 <= value < math.inf, f"{name}={value} must be finite and not negative.")
    require(passes in ("two", "serial"), f"passes={passes!r} must be 'two' or 'serial'.")
    rates = (_rate(input_sensitivity, input_scale), _rate(latent_sensitivity, latent_scale))
    rate = sum(rates) if passes == "two" else min(rates)
    reach = laplace_reach(p_lower, p_upper)
    if reach == 0 or rate == math.inf:
        return 0.0
    return reach / rate if rate > 0 else math.inf


def _rate(sensitivity: float, scale: float) -> float:
    """eps per unit of r."""
    if sensitivity == 0 or scale == math.inf:
        return 0.0
    return sensitivity / scale if scale > 0 else math.inf


@torch.no_grad()
def latent_l1(layer: nn.Conv2d | nn.Linear, input_shape: tuple[int, ...], norm: Literal["Linf", "L1"]) -> float:
    """S_h: a bound on ||layer(x) - layer(x')||_1 over ||x - x'|| <= 1, for inputs of `input_shape`, in float64.

    Linf: the sum over all output units of the L1 norm of their weights, with the weights that padding cuts off left
    out; L1: the largest L1 norm of what one input reaches.
    """
    if norm == "L1":
        return sensitivity(nn.Sequential(layer), "L1", "L1")
    weight = layer.weight.detach().double().abs()
    ones = torch.ones(1, *input_shape, dtype=torch.float64, device=weight.device)
    if isinstance(layer, nn.Linear):
        reached: Tensor = ones.flatten(1) @ weight.T
    else:
        require(layer.padding_mode == "zeros", "the convolution must have padding_mode='zeros'.")
        reached = nn.functional.conv2d(ones, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    return float(reached.sum()) * (1 + 1e-9)
