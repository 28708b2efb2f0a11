"""Residual networks with full pre-activation (He et al., ECCV 2016), among them PreActResNet-18."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trivet.methods import method
from trivet.models import initialize
from trivet.models.inputs import require_fit
from trivet.models.normalize import normalization
from trivet.models.norms import Norm, norm_layer


class PreActBlock(nn.Module):
    """shortcut + F(a), a = relu(norm(x)), F = conv3x3, norm, relu, conv3x3.

    The shortcut is x, or a 1x1 convolution of a where the shape changes.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm) -> None:
        super().__init__()
        bias = norm == "none"
        self.norm1 = norm_layer(norm, inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=bias)
        self.norm2 = norm_layer(norm, outputs)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=bias)
        projects = stride != 1 or inputs != outputs
        self.projection = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=bias) if projects else None

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu1(self.norm1(x))
        shortcut = x if self.projection is None else self.projection(active)
        residual: Tensor = self.conv2(self.relu2(self.norm2(self.conv1(active))))
        return residual + shortcut


def preact_network(
    input_shape: tuple[int, int, int],
    num_classes: int,
    stem: int,
    stages: Sequence[tuple[int, int]],
    norm: Norm,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    generator: torch.Generator | None,
    block: type[PreActBlock] = PreActBlock,
) -> nn.Sequential:
    """A 3x3 convolution of `stem` channels, `stages` of (blocks, channels), norm, relu, mean over pixels, logits.

    Every stage but the first halves the image.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(normalize=normalization(input_shape[0], mean, std))
    layers["conv"] = nn.Conv2d(input_shape[0], stem, 3, padding=1, bias=norm == "none")
    inputs = stem
    for stage, (blocks, outputs) in enumerate(stages, 1):
        for number in range(1, blocks + 1):
            stride = 2 if stage > 1 and number == 1 else 1
            layers[f"block{stage}_{number}"] = block(inputs, outputs, stride, norm)
            inputs = outputs
    layers["norm"], layers["relu"] = norm_layer(norm, inputs), nn.ReLU()
    layers["pool"], layers["flatten"] = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    layers["logits"] = nn.Linear(inputs, num_classes)
    model = nn.Sequential(layers)
    initialize.residual_(model, generator, zero_last="conv2" if norm == "none" else None)
    return model


@method(title="PreActResNet-18", paper="He et al., ECCV 2016", year=2016)
def preact_resnet18(
    input_shape: tuple[int, int, int],
    num_classes: int,
    norm: Norm = "batch",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    generator: torch.Generator | None = None,
) -> nn.Sequential:
    """Four stages of two pre-activation blocks with 64, 128, 256 and 512 channels; 11.17 million parameters.

    Without `norm`, every block's second convolution starts at zero, as in `resnet`. [B, C, H, W] to [B, K].
    """
    require_fit("preact_resnet18", input_shape, num_classes)
    stages = [(2, 64), (2, 128), (2, 256), (2, 512)]
    return preact_network(input_shape, num_classes, 64, stages, norm, mean, std, generator)
