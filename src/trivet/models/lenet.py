"""LeNet as the randomized-smoothing literature uses it on MNIST (after LeCun et al., 1998)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

from trivet.methods import method
from trivet.models import initialize
from trivet.models.inputs import require_fit
from trivet.models.normalize import normalization


@method(title="LeNet", paper="LeCun et al., Proc. IEEE 1998", year=1998)
def lenet(
    input_shape: tuple[int, int, int],
    num_classes: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    generator: torch.Generator | None = None,
) -> nn.Sequential:
    """5x5 convolutions of 20 and 50 channels, each with ReLU and 2x2 max-pool, a layer of 500, logits.

    Convolutions are not padded: 28x28 becomes 4x4 before the linear layers, and 16x16 is the smallest image that
    fits. [B, C, H, W] to [B, K].
    """
    require_fit("lenet", input_shape, num_classes, smallest=16)
    channels, height, breadth = input_shape
    rows, columns = (((side - 4) // 2 - 4) // 2 for side in (height, breadth))
    model = nn.Sequential(
        OrderedDict(
            normalize=normalization(channels, mean, std),
            conv1=nn.Conv2d(channels, 20, 5),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(20, 50, 5),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(50 * rows * columns, 500),
            relu3=nn.ReLU(),
            logits=nn.Linear(500, num_classes),
        )
    )
    initialize.uniform_(model, generator)
    return model
