"""CNN7, the network on which certified training is compared (Shi et al., NeurIPS 2021)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

from trivet.errors import require
from trivet.methods import method
from trivet.models import initialize
from trivet.models.inputs import require_fit
from trivet.models.normalize import normalization


@method(title="CNN7", paper="Shi et al., NeurIPS 2021", year=2021)
def cnn7(
    input_shape: tuple[int, int, int],
    num_classes: int,
    width: int = 64,
    hidden: int = 512,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    generator: torch.Generator | None = None,
) -> nn.Sequential:
    """Five 3x3 convolutions of width, width, 2 width (stride 2), 2 width, 2 width, a layer of `hidden`, logits.

    BatchNorm and ReLU follow every layer but the last; weights are drawn for interval bounds (`initialize.ibp_`).
    17.2 million parameters for 32x32 images of three channels. [B, C, H, W] to [B, K].
    """
    require_fit("cnn7", input_shape, num_classes)
    require(width >= 1, f"width={width} must be at least 1.")
    require(hidden >= 1, f"hidden={hidden} must be at least 1.")
    channels, height, breadth = input_shape
    layers: OrderedDict[str, nn.Module] = OrderedDict(normalize=normalization(channels, mean, std))
    for number, (filters, stride) in enumerate(
        ((width, 1), (width, 1), (2 * width, 2), (2 * width, 1), (2 * width, 1)), 1
    ):
        layers[f"conv{number}"] = nn.Conv2d(channels, filters, 3, stride, padding=1)
        layers[f"norm{number}"], layers[f"relu{number}"] = nn.BatchNorm2d(filters), nn.ReLU()
        channels = filters
    layers["flatten"] = nn.Flatten()
    # The one stride halves the image, rounding up.
    layers["fc1"] = nn.Linear(channels * ((height + 1) // 2) * ((breadth + 1) // 2), hidden)
    layers["norm6"], layers["relu6"] = nn.BatchNorm1d(hidden), nn.ReLU()
    layers["logits"] = nn.Linear(hidden, num_classes)
    model = nn.Sequential(layers)
    initialize.ibp_(model, generator)
    return model
