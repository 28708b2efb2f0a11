"""The network of the MNIST Adversarial Examples Challenge (Madry et al., ICLR 2018)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

from trivet.methods import method
from trivet.models import initialize
from trivet.models.inputs import require_fit
from trivet.models.normalize import normalization


@method(title="MNIST challenge CNN", paper="Madry et al., ICLR 2018", year=2018)
def mnist_cnn(
    input_shape: tuple[int, int, int],
    num_classes: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    generator: torch.Generator | None = None,
) -> nn.Sequential:
    """5x5 convolutions of 32 and 64 channels, each followed by a 2x2 max-pool, a layer of 1024, logits.

    Convolutions keep the size of their input. Weights start normal with deviation 0.1, biases at 0.1, as in the
    challenge. [B, C, H, W] to [B, K], from 4x4 pixels up.
    """
    require_fit("mnist_cnn", input_shape, num_classes, smallest=4)
    channels, height, breadth = input_shape
    model = nn.Sequential(
        OrderedDict(
            normalize=normalization(channels, mean, std),
            conv1=nn.Conv2d(channels, 32, 5, padding=2),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(32, 64, 5, padding=2),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(64 * (height // 4) * (breadth // 4), 1024),
            relu3=nn.ReLU(),
            logits=nn.Linear(1024, num_classes),
        )
    )
    initialize.truncated_normal_(model, generator)
    return model
