"""The MNIST network of TRADES (Zhang et al., ICML 2019), after Carlini & Wagner."""

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


@method(title="TRADES small CNN", paper="Zhang et al., ICML 2019", year=2019)
def trades_cnn(
    input_shape: tuple[int, int, int],
    num_classes: int,
    dropout: float = 0.5,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    generator: torch.Generator | None = None,
) -> nn.Sequential:
    """3x3 convolutions 32, 32, pool, 64, 64, pool, then layers of 200 and 200 with dropout between, logits.

    Convolutions are not padded: 28x28 becomes 4x4 before the linear layers, and 16x16 is the smallest image that
    fits. The last layer starts at zero, as in the authors' code. [B, C, H, W] to [B, K].
    """
    require_fit("trades_cnn", input_shape, num_classes, smallest=16)
    require(0 <= dropout < 1, f"dropout={dropout} must lie in [0, 1).")
    channels, height, breadth = input_shape
    rows, columns = (((side - 4) // 2 - 4) // 2 for side in (height, breadth))
    model = nn.Sequential(
        OrderedDict(
            normalize=normalization(channels, mean, std),
            conv1=nn.Conv2d(channels, 32, 3),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(32, 32, 3),
            relu2=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv3=nn.Conv2d(32, 64, 3),
            relu3=nn.ReLU(),
            conv4=nn.Conv2d(64, 64, 3),
            relu4=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(64 * rows * columns, 200),
            relu5=nn.ReLU(),
            dropout=nn.Dropout(dropout),
            fc2=nn.Linear(200, 200),
            relu6=nn.ReLU(),
            logits=nn.Linear(200, num_classes),
        )
    )
    initialize.uniform_(model, generator)
    for name in ("conv1", "conv2", "conv3", "conv4"):
        initialize.kaiming_(model.get_submodule(name), generator)
    with torch.no_grad():
        for tensor in model.get_submodule("logits").parameters():
            tensor.zero_()
    return model
