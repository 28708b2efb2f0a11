"""LeNet-5 with parameter-free normalisation after each rectifier, for training under privacy noise."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from trivet.methods import method
from trivet.models import initialize
from trivet.models.bare_norms import BareNorm, assembled, bare_norm
from trivet.models.inputs import require_fit
from trivet.models.normalize import normalization
from trivet.models.weight_noise import convolution, linear


@method(title="LeNet-5", paper="LeCun et al., Proc. IEEE 1998", year=1998)
def lenet5(
    input_shape: tuple[int, int, int],
    num_classes: int,
    norm: BareNorm = "none",
    weight_noise: float = 0.0,
    public_images: Path | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """5x5 convolutions of 6 and 16 channels, each with ReLU, `norm`, 2x2 max-pool; layers of 120 and 84; logits.

    The first convolution is padded, so that 28x28 becomes 5x5; 12x12 is the smallest image that fits. The place of
    the normalisation, and that it has no parameters, are SIDP's (Davody et al., 2020): a layer before it may grow
    without changing the function, so that noise on its weights matters less. [B, C, H, W] to [B, K].

    Args:
        norm: see `BareNorm`; "layer" and "group" treat each record alone, "public_batch" needs public images.
        weight_noise: standard deviation of the fresh noise on every weight in training passes; 0 for none.
        public_images: a .npy file of images [A, C, H, W] that are nobody's secret; without it, random patterns.
    """
    require_fit("lenet5", input_shape, num_classes, smallest=12)
    channels, height, breadth = input_shape
    rows, columns = height // 2, breadth // 2
    layers: OrderedDict[str, nn.Module] = OrderedDict(normalize=normalization(channels, mean, std))
    layers["conv1"], layers["relu1"] = convolution(channels, 6, 5, weight_noise, padding=2), nn.ReLU()
    layers["norm1"], layers["pool1"] = bare_norm(norm, (6, height, breadth)), nn.MaxPool2d(2)
    layers["conv2"], layers["relu2"] = convolution(6, 16, 5, weight_noise), nn.ReLU()
    layers["norm2"], layers["pool2"] = bare_norm(norm, (16, rows - 4, columns - 4)), nn.MaxPool2d(2)
    layers["flatten"] = nn.Flatten()
    inputs = 16 * ((rows - 4) // 2) * ((columns - 4) // 2)
    for number, width in enumerate((120, 84), 1):
        layers[f"fc{number}"], layers[f"relu{number + 2}"] = linear(inputs, width, weight_noise), nn.ReLU()
        layers[f"norm{number + 2}"] = bare_norm(norm, (width,))
        inputs = width
    layers["logits"] = linear(inputs, num_classes, weight_noise)
    model = assembled(layers, norm, input_shape, public_images, generator)
    initialize.uniform_(model, generator)
    return model
