"""Residual networks for 32x32 images: ResNet-20, 32, 44, 56, 110 (He et al., CVPR 2016, section 4.2)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trivet.errors import require
from trivet.methods import method
from trivet.models import initialize
from trivet.models.inputs import require_fit
from trivet.models.normalize import normalization
from trivet.models.norms import Norm, norm_layer


class BasicBlock(nn.Module):
    """relu(F(x) + shortcut(x)), F = conv3x3, norm, relu, conv3x3, norm; the shortcut projects where shapes change."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm) -> None:
        super().__init__()
        bias = norm == "none"
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=bias)
        self.norm1 = norm_layer(norm, outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=bias)
        self.norm2 = norm_layer(norm, outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=bias)
            self.shortcut = nn.Sequential(OrderedDict(conv=projection, norm=norm_layer(norm, outputs)))
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        residual = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        out: Tensor = self.relu2(residual + self.shortcut(x))
        return out


@method(title="ResNet for CIFAR", paper="He et al., CVPR 2016", year=2016)
def resnet(
    input_shape: tuple[int, int, int],
    num_classes: int,
    depth: int = 20,
    width: int = 1,
    norm: Norm = "batch",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    generator: torch.Generator | None = None,
) -> nn.Sequential:
    """A 3x3 convolution, three stages of (depth - 2) / 6 blocks with 16, 32, 64 times `width` channels, mean, logits.

    Where a stage halves the image, the shortcut is a strided 1x1 convolution with norm (the paper's option B, as in
    the smoothing literature), not zero padding (option A): it exports and bounds like any other layer, for 1 % more
    weights.
    Without `norm`, every block's second convolution starts at zero (Zhang et al., Fixup, ICLR 2019), for the
    variance would double from block to block otherwise. [B, C, H, W] to [B, K].
    """
    require_fit("resnet", input_shape, num_classes)
    require(depth >= 8 and depth % 6 == 2, f"depth={depth} must be 6n + 2, e.g. 20, 32, 56 or 110.")
    require(width >= 1, f"width={width} must be at least 1.")
    layers: OrderedDict[str, nn.Module] = OrderedDict(normalize=normalization(input_shape[0], mean, std))
    layers["conv"] = nn.Conv2d(input_shape[0], 16 * width, 3, padding=1, bias=norm == "none")
    layers["norm"], layers["relu"] = norm_layer(norm, 16 * width), nn.ReLU()
    inputs = 16 * width
    for stage, outputs in enumerate((16 * width, 32 * width, 64 * width), 1):
        for block in range(1, (depth - 2) // 6 + 1):
            stride = 2 if stage > 1 and block == 1 else 1
            layers[f"block{stage}_{block}"] = BasicBlock(inputs, outputs, stride, norm)
            inputs = outputs
    layers["pool"], layers["flatten"] = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    layers["logits"] = nn.Linear(inputs, num_classes)
    model = nn.Sequential(layers)
    initialize.residual_(model, generator, zero_last="conv2" if norm == "none" else None)
    return model
