"""The small strided MNIST network of fast adversarial training (Wong, Rice & Kolter, ICLR 2020)."""

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


@method(title="Small CNN", paper="Wong, Rice & Kolter, ICLR 2020", year=2020)
def small_cnn(
    input_shape: tuple[int, int, int],
    num_classes: int,
    width: int = 1,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    generator: torch.Generator | None = None,
) -> nn.Sequential:
    """Two 4x4 convolutions of stride 2 (16 and 32 times `width` channels), a layer of 100, logits.

    No pooling and no normalisation: cheap to bound, and every record is treated alone. Works from 4x4 pixels up; at
    28x28 with width 1 it is the paper's network. [B, C, H, W] to [B, K].
    """
    require_fit("small_cnn", input_shape, num_classes, smallest=4)
    require(width >= 1, f"width={width} must be at least 1.")
    channels, height, breadth = input_shape
    model = nn.Sequential(
        OrderedDict(
            normalize=normalization(channels, mean, std),
            conv1=nn.Conv2d(channels, 16 * width, 4, stride=2, padding=1),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(16 * width, 32 * width, 4, stride=2, padding=1),
            relu2=nn.ReLU(),
            flatten=nn.Flatten(),
            # Each convolution halves the image, rounding down.
            fc1=nn.Linear(32 * width * (height // 4) * (breadth // 4), 100),
            relu3=nn.ReLU(),
            logits=nn.Linear(100, num_classes),
        )
    )
    initialize.uniform_(model, generator)
    return model
