"""The convolution networks of SingleProp (Boopathy et al., AAAI 2021), after their code."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import nn

from trivet.methods import method
from trivet.models import initialize
from trivet.models.inputs import require_fit
from trivet.models.normalize import normalization


class _Shape(NamedTuple):
    """Convolutions as (filters, kernel, stride), whether they are padded, and the widths of the layers after them."""

    convolutions: tuple[tuple[int, int, int], ...]
    padded: bool
    hidden: tuple[int, ...]


_SHAPES = {
    "small": _Shape(((16, 4, 2), (32, 4, 1)), True, (100,)),
    "medium": _Shape(((32, 3, 1), (32, 4, 2), (64, 3, 1), (64, 4, 2)), False, (512, 512)),
    "wide": _Shape(((128, 3, 1), (256, 3, 2), (512, 3, 2)), True, (1024,)),
    "large": _Shape(((64, 3, 1), (64, 3, 1), (128, 3, 2), (128, 3, 1), (128, 3, 1)), True, (512,)),
}


@method(title="SingleProp CNN", paper="Boopathy et al., AAAI 2021", year=2021)
def single_prop_cnn(
    input_shape: tuple[int, int, int],
    num_classes: int,
    size: Literal["small", "medium", "wide", "large"] = "small",
    weights: Literal["fan_in", "ibp"] = "fan_in",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    generator: torch.Generator | None = None,
) -> nn.Sequential:
    """Strided convolutions and fully connected layers with ReLUs, no pooling, no normalisation between them.

        small     16 filters of 4x4, stride 2; 32 of 4x4; a layer of 100
        medium    32 of 3x3; 32 of 4x4, stride 2; 64 of 3x3; 64 of 4x4, stride 2, none padded; layers of 512 and 512
        wide      128 of 3x3; 256 and 512 of 3x3, stride 2; a layer of 1024
        large     64, 64 of 3x3; 128 of 3x3, stride 2; 128, 128 of 3x3; a layer of 512 (CIFAR-10)

    then logits. Padding is the authors': as little as makes a map of side / stride, rounded up, and the odd row and
    column right and below. "fan_in" weights are theirs, normal with variance 1 / fan_in and biases zero; "ibp" are
    those of Shi et al. 2021. [B, C, H, W] to [B, K], from 4x4 pixels up, `medium` from 16x16.
    """
    require_fit("single_prop_cnn", input_shape, num_classes, smallest=16 if size == "medium" else 4)
    shape = _SHAPES[size]
    layers: OrderedDict[str, nn.Module] = OrderedDict(normalize=normalization(input_shape[0], mean, std))
    channels, *sides = input_shape
    number = 0
    for filters, kernel, stride in shape.convolutions:
        number += 1
        if shape.padded:
            pads = [max((math.ceil(side / stride) - 1) * stride + kernel - side, 0) for side in sides]
            (top, left), (bottom, right) = ([pad // 2 for pad in pads], [pad - pad // 2 for pad in pads])
            layers[f"pad{number}"] = nn.ZeroPad2d((left, right, top, bottom))
            sides = [side + pad for side, pad in zip(sides, pads, strict=True)]
        layers[f"conv{number}"] = nn.Conv2d(channels, filters, kernel, stride)
        layers[f"relu{number}"] = nn.ReLU()
        channels, sides = filters, [(side - kernel) // stride + 1 for side in sides]
    layers["flatten"] = nn.Flatten()
    inputs = channels * math.prod(sides)
    for index, width in enumerate(shape.hidden, 1):
        layers[f"fc{index}"], layers[f"relu{number + index}"] = nn.Linear(inputs, width), nn.ReLU()
        inputs = width
    layers["logits"] = nn.Linear(inputs, num_classes)
    model = nn.Sequential(layers)
    if weights == "ibp":
        initialize.ibp_(model, generator)
    else:
        initialize.fan_in_(model, generator)
    return model
