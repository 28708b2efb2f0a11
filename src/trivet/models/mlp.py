"""The multilayer perceptron."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

from trivet.errors import require
from trivet.methods import method
from trivet.models import initialize
from trivet.models.inputs import require_fit
from trivet.models.normalize import normalization


@method(title="Multilayer perceptron")
def mlp(
    input_shape: tuple[int, int, int],
    num_classes: int,
    hidden: Sequence[int] = (256, 256),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    generator: torch.Generator | None = None,
) -> nn.Sequential:
    """Pixels, then fully connected ReLU layers of the widths in `hidden`, then logits: [B, C, H, W] to [B, K].

    Weights are drawn after He et al. 2015 from `generator`; `mean` and `std` are per channel.
    """
    require_fit("mlp", input_shape, num_classes)
    require(all(width >= 1 for width in hidden), f"hidden={list(hidden)} must be widths of at least 1.")
    layers: OrderedDict[str, nn.Module] = OrderedDict(normalize=normalization(input_shape[0], mean, std))
    layers["flatten"] = nn.Flatten()
    inputs = math.prod(input_shape)
    for i, width in enumerate(hidden, 1):
        layers[f"fc{i}"], layers[f"relu{i}"] = nn.Linear(inputs, width), nn.ReLU()
        inputs = width
    layers["logits"] = nn.Linear(inputs, num_classes)
    model = nn.Sequential(layers)
    initialize.kaiming_(model, generator)
    return model
