"""Decoders: networks that draw the image of which a feature vector was made, and how one learns beside a classifier."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trivet.errors import require
from trivet.models import initialize

_SMALLEST = 8  # pixels: below this, halving an image leaves too little for a convolution to see


def decoder(
    features: int, image_shape: tuple[int, int, int], width: int = 32, generator: torch.Generator | None = None
) -> nn.Sequential:
    """Feature vectors [B, D] to images [B, C, H, W] in (0, 1).

    A linear layer onto `width` maps of about 8x8 pixels, then twice the size and a 3x3 convolution until the image's
    size is reached, one more convolution, a sigmoid. ReLU between. No layer mixes records.

    Args:
        features: D.
        image_shape: (C, H, W).
        width: maps in every hidden layer.
        generator: draws the first weights, by PyTorch's default rule.

    Raises:
        BadValue: numbers below 1.
    """
    channels, *size = image_shape
    require(min(image_shape) >= 1, f"image_shape={image_shape} must be (channels, height, width), each at least 1.")
    require(features >= 1, f"features={features} must be at least 1.")
    require(width >= 1, f"width={width} must be at least 1.")
    sizes = [tuple(size)]
    while max(sizes[0]) > _SMALLEST:
        sizes.insert(0, tuple(-(-side // 2) for side in sizes[0]))
    first = (width, *sizes[0])
    layers: list[nn.Module] = [nn.Linear(features, math.prod(first)), nn.ReLU(), nn.Unflatten(1, first)]
    for larger in sizes[1:]:
        layers += [nn.Upsample(larger), nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Conv2d(width, channels, 3, padding=1), nn.Sigmoid())
    initialize.uniform_(model, generator)
    return model


class LearningDecoder:
    """A decoder and its optimizer: min E || G(z) - x ||^2 / D by Adam, one step a call, with state that can be saved.

    Attributes:
        net: the decoder G.
        image_shape: (C, H, W).
    """

    def __init__(
        self,
        features: int,
        image_shape: tuple[int, int, int],
        rate: float = 1e-3,
        generator: torch.Generator | None = None,
    ) -> None:
        self.image_shape = image_shape
        self.net = decoder(features, image_shape, generator=generator)
        self.optimizer = torch.optim.Adam(self.net.parameters(), rate)

    def to(self, device: torch.device) -> Self:
        self.net.to(device)
        for moments in self.optimizer.state.values():
            moments.update({name: value.to(device) for name, value in moments.items() if value.ndim})
        return self

    def learn(self, z: Tensor, x: Tensor) -> Tensor:
        """One step on features z [B, D] and their images x [B, C, H, W]; the mean squared error before it."""
        with torch.enable_grad():
            error = F.mse_loss(self.net(z.detach()), x)
            self.optimizer.zero_grad()
            error.backward()
        self.optimizer.step()
        return error.detach()

    @torch.no_grad()
    def draw(self, z: Tensor) -> Tensor:
        """G(z), [B, C, H, W]; detached."""
        images: Tensor = self.net(z)
        return images

    def state(self) -> dict[str, Tensor]:
        """Copies of all that `restored` needs."""
        moments = self.optimizer.state_dict()["state"]
        return {
            "image_shape": torch.tensor(self.image_shape),
            **{f"net.{name}": tensor.clone() for name, tensor in self.net.state_dict().items()},
            **{f"adam.{i}.{name}": value.clone() for i, each in moments.items() for name, value in each.items()},
        }

    @classmethod
    def restored(cls, state: Mapping[str, Tensor], rate: float = 1e-3) -> Self:
        """The decoder whose `state` this is; its next steps are those that the saved one would have taken."""
        channels, height, width = state["image_shape"].tolist()
        made = cls(state["net.0.weight"].shape[1], (channels, height, width), rate)
        made.net.load_state_dict({name[4:]: value for name, value in state.items() if name.startswith("net.")})
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in state.items():
            if name.startswith("adam."):
                _, number, key = name.split(".")
                moments.setdefault(int(number), {})[key] = value.clone()
        made.optimizer.load_state_dict({**made.optimizer.state_dict(), "state": moments})
        return made
