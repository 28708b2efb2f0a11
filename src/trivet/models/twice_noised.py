"""Networks with fresh Laplace noise on input and first layer: StoBatch's idea, in a form that can be proved."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from trivet.errors import require
from trivet.methods import method
from trivet.models import initialize
from trivet.models.bare_norms import bare_norm
from trivet.models.inputs import require_fit
from trivet.models.noise_layer import NoiseLayer
from trivet.models.normalize import normalization

_Norm = Literal["none", "layer", "group"]


class TwiceNoised(nn.Module):
    """after( first( normalize( x + Lap(b_x) ) ) + Lap(b_h) ), both drawn anew for every record in every pass.

    In training and at test alike, at full scale: that is what the certifier `twice_noised` needs. The classifier to
    deploy is the most frequent answer. [B, C, H, W] in [0, 1] to logits [B, K].
    """

    def __init__(
        self,
        input_noise: NoiseLayer,
        normalize: nn.Module,
        first: nn.Linear | nn.Conv2d,
        latent_noise: NoiseLayer,
        after: nn.Module,
    ) -> None:
        super().__init__()
        self.input_noise, self.normalize, self.first = input_noise, normalize, first
        self.latent_noise, self.after = latent_noise, after

    def latent(self, x: Tensor) -> Tensor:
        """The first layer's output, without either noise."""
        scaled = self.normalize(x)
        hidden: Tensor = self.first(scaled.flatten(1) if isinstance(self.first, nn.Linear) else scaled)
        return hidden

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.latent_noise(self.latent(self.input_noise(x))))


@method(title="Twice-noised perceptron", legs="robust")
def twice_noised_mlp(
    input_shape: tuple[int, int, int],
    num_classes: int,
    input_scale: float = 0.1,
    latent_scale: float = 0.1,
    hidden: Sequence[int] = (64,),
    norm: _Norm = "layer",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    generator: torch.Generator | None = None,
) -> TwiceNoised:
    """Noised pixels, a linear layer, noise, then ReLU, `norm` and further layers of the widths in `hidden`, logits.

    The sound stand-in for `stobatch_mlp`. The noise is for certificates: privacy of the training records is up to
    `dp_sgd`, whose account it does not touch, as it depends on no record.

    Args:
        input_scale, latent_scale: of the Laplace noise on pixels in [0, 1], and on the first layer.
        norm: after each rectifier, without parameters, each record by itself.
    """
    require_fit("twice_noised_mlp", input_shape, num_classes)
    require(len(hidden) >= 1 and min(hidden) >= 1, f"hidden={list(hidden)} must be one or more widths of at least 1.")
    after: OrderedDict[str, nn.Module] = OrderedDict()
    for number, width in enumerate(hidden, 1):
        if number > 1:
            after[f"fc{number}"] = nn.Linear(hidden[number - 2], width)
        after[f"relu{number}"], after[f"norm{number}"] = nn.ReLU(), bare_norm(norm, (width,))
    after["logits"] = nn.Linear(hidden[-1], num_classes)
    first = nn.Linear(math.prod(input_shape), hidden[0])
    scaling = normalization(input_shape[0], mean, std)
    return _assembled(input_scale, latent_scale, scaling, first, nn.Sequential(after), generator)


@method(title="Twice-noised CNN", legs="robust")
def twice_noised_cnn(
    input_shape: tuple[int, int, int],
    num_classes: int,
    input_scale: float = 0.1,
    latent_scale: float = 0.1,
    norm: _Norm = "group",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    generator: torch.Generator | None = None,
) -> TwiceNoised:
    """5x5 convolutions of 32 and 64 channels, both of stride 2, a layer of 256, logits, with noise as in the MLP."""
    require_fit("twice_noised_cnn", input_shape, num_classes)
    rows, columns = ((side + 1) // 2 for side in input_shape[1:])
    fewer, narrower = ((side + 3) // 4 for side in input_shape[1:])
    after = nn.Sequential(
        OrderedDict(
            relu1=nn.ReLU(),
            norm1=bare_norm(norm, (32, rows, columns)),
            conv2=nn.Conv2d(32, 64, 5, stride=2, padding=2),
            relu2=nn.ReLU(),
            norm2=bare_norm(norm, (64, fewer, narrower)),
            flatten=nn.Flatten(),
            fc1=nn.Linear(64 * fewer * narrower, 256),
            relu3=nn.ReLU(),
            norm3=bare_norm(norm, (256,)),
            logits=nn.Linear(256, num_classes),
        )
    )
    first = nn.Conv2d(input_shape[0], 32, 5, stride=2, padding=2)
    return _assembled(input_scale, latent_scale, normalization(input_shape[0], mean, std), first, after, generator)


def _assembled(
    input_scale: float,
    latent_scale: float,
    normalize: nn.Module,
    first: nn.Linear | nn.Conv2d,
    after: nn.Sequential,
    generator: torch.Generator | None,
) -> TwiceNoised:
    for name, scale in {"input_scale": input_scale, "latent_scale": latent_scale}.items():
        require(0 < scale < math.inf, f"{name}={scale} must be positive and finite.")
    model = TwiceNoised(
        NoiseLayer("laplace", input_scale), normalize, first, NoiseLayer("laplace", latent_scale), after
    )
    initialize.uniform_(model, generator)
    return model
