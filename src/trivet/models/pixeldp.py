"""PixelDP (Lecuyer, Atlidakis, Geambasu, Hsu & Jana, IEEE S&P 2019): robustness from a noisy first layer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from trivet.errors import require
from trivet.methods import method
from trivet.models import initialize
from trivet.models.gaussian_mechanism import classical_multiplier
from trivet.models.inputs import require_fit
from trivet.models.noise_layer import Law, NoiseLayer, NoisyNetwork
from trivet.models.normalize import normalization
from trivet.models.sensitivity import Norm, UnitSensitivity, sensitivity

CHANNELS = 32
"""Of the convolution before the noise."""


@method(title="PixelDP CNN", paper="Lecuyer et al., IEEE S&P 2019", year=2019, legs="robust")
def pixeldp_cnn(
    input_shape: tuple[int, int, int],
    num_classes: int,
    noise: Law = "gaussian",
    attack_norm: Norm = "L2",
    attack_size: float = 0.1,
    epsilon: float = 1.0,
    delta: float = 0.05,
    hidden: int = 1024,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    generator: torch.Generator | None = None,
) -> NoisyNetwork:
    """5x5 convolution of 32 channels and stride 2, noise, ReLU, the same with 64 channels, a layer of 1024, logits.

    Up to the noise the sensitivity is 1 to `attack_norm`, in pixel units of [0, 1] whatever the normalisation
    (see `UnitSensitivity`; the published code comes near 1 by Parseval steps). The noise makes the layer
    (`epsilon`, `delta`)-indistinguishable between inputs that are `attack_size` = L apart:

        Gaussian:  s = L sqrt(2 ln(1.25 / delta)) / epsilon        Laplace:  b = L / epsilon   (L1 attacks only)

    It says nothing about the privacy of training records: for that, train it by DP-SGD. Nor is a single pass robust;
    the average answer is, as far as the certifier `pixeldp` proves: below what randomized smoothing proves for as
    much noise. The larger L is, the wider the reach and the lower the accuracy.

    Args:
        noise: "gaussian" for L1 or L2 attacks, "laplace" for L1.
        attack_norm: the geometry the first layer is normalised for.
        attack_size: L, the attack the noise is made for; not the radius that is certified in the end.
        epsilon: of the layer at that size, at most 1; 1 as published.
        delta: of the layer at that size; 0.05 as published.
        hidden: units of the penultimate layer.

    Raises:
        BadValue: settings out of range, or Laplace noise against L2 attacks.
    """
    require(0 < attack_size < torch.inf, f"attack_size={attack_size} must be positive and finite.")
    require(0 < epsilon <= 1, f"epsilon={epsilon} must lie in (0, 1], where the classical bound holds.")
    require(
        noise == "gaussian" or attack_norm == "L1",
        f"noise={noise!r} protects from L1 attacks only; set attack_norm to L1 or noise to gaussian.",
    )
    multiplier = classical_multiplier(epsilon, delta) if noise == "gaussian" else 1 / epsilon
    layer = NoiseLayer(noise, attack_size * multiplier)
    return noisy_cnn(
        input_shape, num_classes, layer, torch.ones(CHANNELS), attack_norm, hidden, mean, std, generator, "pixeldp_cnn"
    )


def noisy_cnn(
    input_shape: tuple[int, int, int],
    num_classes: int,
    noise: NoiseLayer,
    shares: Tensor,
    attack_norm: Norm,
    hidden: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    generator: torch.Generator | None,
    name: str,
) -> NoisyNetwork:
    """The network of the paper around `noise`; `shares` [32] are the relative scales of its channels."""
    require_fit(name, input_shape, num_classes, smallest=4)
    require(hidden >= 1, f"hidden={hidden} must be at least 1.")
    channels, height, width = input_shape
    rows, columns = (-(-side // 4) for side in (height, width))  # each convolution halves the image, rounding up
    normalize = normalization(channels, mean, std)
    conv1 = nn.Conv2d(channels, CHANNELS, 5, stride=2, padding=2)
    before = nn.Sequential(OrderedDict(normalize=normalize, conv1=conv1))
    after = nn.Sequential(
        OrderedDict(
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(CHANNELS, 64, 5, stride=2, padding=2),
            relu2=nn.ReLU(),
            flatten=nn.Flatten(),
            fc1=nn.Linear(64 * rows * columns, hidden),
            relu3=nn.ReLU(),
            logits=nn.Linear(hidden, num_classes),
        )
    )
    model = NoisyNetwork(before, noise, after)
    initialize.uniform_(model, generator)
    noise_norm: Norm = "L2" if noise.law == "gaussian" else "L1"
    gain = sensitivity(nn.Sequential(normalize), attack_norm, attack_norm)
    unit = UnitSensitivity((2, 2), attack_norm, noise_norm, shares, gain)
    # After the first draw of weights: writing into a parametrized tensor would be lost.
    parametrize.register_parametrization(conv1, "weight", unit)
    return model
