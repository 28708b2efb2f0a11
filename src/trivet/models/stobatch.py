"""The networks of StoBatch (Phan et al., ICML 2020): one Laplace draw, kept for ever, at input, first layer and labels.

The draw is published with the weights, and it is the same for every record: it hides nothing. See
`trivet.privacy.stobatch` for what was claimed of it.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trivet.errors import require
from trivet.methods import method
from trivet.models import initialize
from trivet.models.inputs import require_fit
from trivet.models.normalize import normalization

VOID = "privacy claim void: one noise draw shared by all records hides none of them"
_Norm = Literal["batch", "none"]
_KERNEL, _STRIDE, _PADDING = 5, 2, 2  # of the convolutions


class StoBatchNetwork(nn.Module):
    """f(x) = g(hbar), hbar = theta_1 xbar + 2 chi_2 / m, xbar = x' + chi_1 / m, x' the input scaled to [-1, 1].

    theta_1 is the first layer (no bias), which also decodes: the reconstruction of xbar is theta_1^T hbar. `rest` maps
    hbar to the last hidden layer h_pi in [-1, 1], and `logits` has the weights W_pi.

    Attributes:
        input_noise: chi_1 / m, the shape of an input.
        latent_noise: 2 chi_2 / m, the shape of hbar.
        label_noise: chi_3 / m, the shape [K, |h_pi|] of W_pi.
    """

    input_noise: Tensor
    latent_noise: Tensor
    label_noise: Tensor

    def __init__(self, normalize: nn.Module, first: nn.Linear | nn.Conv2d, rest: nn.Module, logits: nn.Linear) -> None:
        super().__init__()
        self.normalize, self.first, self.rest, self.logits = normalize, first, rest, logits
        self.flat = isinstance(first, nn.Linear)

    def draw(
        self,
        input_shape: tuple[int, int, int],
        batch_size: int,
        eps_features: float,
        eps_labels: float,
        generator: torch.Generator | None,
    ) -> None:
        """Draw the three noises, once; the scales are the published ones for batches of `batch_size`."""
        with torch.no_grad():
            x = torch.zeros(1, *input_shape)
            hidden = self.first(x.flatten(1) if self.flat else x)[0]
        scale = self.sensitivity(input_shape) / (batch_size * eps_features)
        shape = (math.prod(input_shape),) if self.flat else input_shape
        labels = 2 * self.logits.in_features / (batch_size * eps_labels)
        self.register_buffer("input_noise", laplace(shape, scale, generator))
        self.register_buffer("latent_noise", laplace(hidden.shape, 2 * scale, generator))
        self.register_buffer("label_noise", laplace(self.logits.weight.shape, labels, generator))

    def sensitivity(self, input_shape: tuple[int, int, int]) -> float:
        """Delta_R = d (beta + 2), as claimed: for convolutions d counts one patch, beta the units of one map."""
        if isinstance(self.first, nn.Linear):
            return self.first.in_features * (self.first.out_features + 2)
        units = math.prod(-(-side // _STRIDE) for side in input_shape[1:])
        return self.first.weight[0].numel() * (units + 2)

    def noised(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """xbar [B, d] or [B, C, H, W], and hbar, for inputs in [0, 1]."""
        scaled = self.normalize(x)
        noised = (scaled.flatten(1) if self.flat else scaled) + self.input_noise
        return noised, self.first(noised) + self.latent_noise

    def reconstruct(self, hidden: Tensor, shape: torch.Size) -> Tensor:
        """theta_1^T hbar, in the shape of xbar."""
        if isinstance(self.first, nn.Linear):
            return hidden @ self.first.weight
        # A convolution of stride 2 makes the same map of sides 2k - 1 and 2k.
        even = tuple((side - 1) % 2 for side in shape[-2:])
        return F.conv_transpose2d(hidden, self.first.weight, stride=_STRIDE, padding=_PADDING, output_padding=even)

    def classify(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.logits(self.rest(hidden))
        return logits

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.noised(x)[1])


def laplace(shape: Sequence[int], scale: float, generator: torch.Generator | None) -> Tensor:
    """Independent Laplace values of the given scale: differences of two exponentials."""
    rising, falling = torch.empty(2, *shape, dtype=torch.float64).exponential_(generator=generator)
    return (scale * (rising - falling)).float()


def _require(batch_size: int, eps_features: float, eps_labels: float) -> None:
    require(batch_size >= 1, f"batch_size={batch_size} must be at least 1.")
    require(eps_features > 0, f"eps_features={eps_features} must be positive; inf is no noise.")
    require(eps_labels > 0, f"eps_labels={eps_labels} must be positive; inf is no noise.")


@method(title="StoBatch perceptron", paper="Phan et al., ICML 2020", year=2020, note=VOID)
def stobatch_mlp(
    input_shape: tuple[int, int, int],
    num_classes: int,
    batch_size: int,
    eps_features: float = 1.0,
    eps_labels: float = 0.1,
    hidden: Sequence[int] = (64,),
    norm: _Norm = "batch",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    generator: torch.Generator | None = None,
) -> StoBatchNetwork:
    """Fully connected layers of the widths in `hidden` on the noised pixels; h_pi is the last. [B, C, H, W] to [B, K].

    Args:
        batch_size: m, the size of the fixed batches; noise is divided by it.
        eps_features, eps_labels: eps_1 and eps_2 of the published formulas. They promise nothing.
        norm: "batch", as published, before each rectifier: it subtracts what all records share, the noise above all.
            "none" treats every record alone.
        mean, std: of the scaling; without them pixels are mapped to [-1, 1].
    """
    require_fit("stobatch_mlp", input_shape, num_classes)
    _require(batch_size, eps_features, eps_labels)
    require(len(hidden) >= 1 and min(hidden) >= 1, f"hidden={list(hidden)} must be one or more widths of at least 1.")
    first = nn.Linear(math.prod(input_shape), hidden[0], bias=False)
    rest: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (width, before) in enumerate(zip(hidden, (0, *hidden), strict=False), 1):
        if before:
            rest[f"fc{number}"] = nn.Linear(before, width)
        rest[f"norm{number}"] = nn.BatchNorm1d(width) if norm == "batch" else nn.Identity()
        rest[f"relu{number}"] = nn.ReLU()
    rest["clip"] = nn.Hardtanh()
    model = StoBatchNetwork(
        _scaling(input_shape, mean, std), first, nn.Sequential(rest), nn.Linear(hidden[-1], num_classes)
    )
    initialize.uniform_(model, generator)
    model.draw(input_shape, batch_size, eps_features, eps_labels, generator)
    return model


@method(title="StoBatch CNN", paper="Phan et al., ICML 2020", year=2020, note=VOID)
def stobatch_cnn(
    input_shape: tuple[int, int, int],
    num_classes: int,
    batch_size: int,
    eps_features: float = 1.0,
    eps_labels: float = 0.1,
    norm: _Norm = "batch",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    generator: torch.Generator | None = None,
) -> StoBatchNetwork:
    """5x5 convolutions of 32 and 64 channels, both of stride 2, a layer of 256, logits: the paper's for MNIST.

    Rectifiers stand for its maxout units. Arguments as for `stobatch_mlp`. [B, C, H, W] to [B, K].
    """
    require_fit("stobatch_cnn", input_shape, num_classes)
    _require(batch_size, eps_features, eps_labels)
    batch = norm == "batch"
    rows, columns = ((side + 3) // 4 for side in input_shape[1:])  # halved twice, rounded up
    rest = nn.Sequential(
        OrderedDict(
            norm1=nn.BatchNorm2d(32) if batch else nn.Identity(),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(32, 64, _KERNEL, stride=_STRIDE, padding=_PADDING),
            norm2=nn.BatchNorm2d(64) if batch else nn.Identity(),
            relu2=nn.ReLU(),
            flatten=nn.Flatten(),
            fc1=nn.Linear(64 * rows * columns, 256),
            norm3=nn.BatchNorm1d(256) if batch else nn.Identity(),
            relu3=nn.ReLU(),
            clip=nn.Hardtanh(),
        )
    )
    first = nn.Conv2d(input_shape[0], 32, _KERNEL, stride=_STRIDE, padding=_PADDING, bias=False)
    model = StoBatchNetwork(_scaling(input_shape, mean, std), first, rest, nn.Linear(256, num_classes))
    initialize.uniform_(model, generator)
    model.draw(input_shape, batch_size, eps_features, eps_labels, generator)
    return model


def _scaling(input_shape: tuple[int, int, int], mean: Sequence[float] | None, std: Sequence[float] | None) -> nn.Module:
    middle = [0.5] * input_shape[0]
    return normalization(input_shape[0], mean or middle, std or middle)
