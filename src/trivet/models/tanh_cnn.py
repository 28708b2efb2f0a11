"""The small tanh network on which private learning is compared on MNIST (Papernot et al., AAAI 2021)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

from trivet.methods import method
from trivet.models import initialize
from trivet.models.inputs import require_fit
from trivet.models.normalize import normalization


@method(title="Tanh CNN", paper="Papernot et al., AAAI 2021", year=2021, legs="private")
def tanh_cnn(
    input_shape: tuple[int, int, int],
    num_classes: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    generator: torch.Generator | None = None,
) -> nn.Sequential:
    """8x8 convolution of 16 channels (stride 2, padding 2), 4x4 of 32 (stride 2), each with tanh and a 2x2 max-pool of
    stride 1, a layer of 32, logits.

    Bounded activations keep per-record gradients small, and with them what clipping takes away; no layer mixes
    records. 26,010 parameters for 28x28 and ten classes. [B, C, H, W] to [B, K], from 16x16 pixels up.
    """
    require_fit("tanh_cnn", input_shape, num_classes, smallest=16)
    channels, height, breadth = input_shape
    rows, columns = ((((side - 4) // 2) - 4) // 2 for side in (height, breadth))
    model = nn.Sequential(
        OrderedDict(
            normalize=normalization(channels, mean, std),
            conv1=nn.Conv2d(channels, 16, 8, stride=2, padding=2),
            tanh1=nn.Tanh(),
            pool1=nn.MaxPool2d(2, stride=1),
            conv2=nn.Conv2d(16, 32, 4, stride=2),
            tanh2=nn.Tanh(),
            pool2=nn.MaxPool2d(2, stride=1),
            flatten=nn.Flatten(),
            fc1=nn.Linear(32 * rows * columns, 32),
            tanh3=nn.Tanh(),
            logits=nn.Linear(32, num_classes),
        )
    )
    initialize.uniform_(model, generator)
    return model
