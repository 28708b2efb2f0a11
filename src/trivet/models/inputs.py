"""What is asked of every input first: does its shape fit, and is it an image in [0, 1]?"""

from __future__ import annotations

from torch import Tensor

from trivet.errors import BadValue, require


def require_fit(model: str, input_shape: tuple[int, int, int], num_classes: int, smallest: int = 1) -> None:
    """Refuse shapes (C, H, W) that are no images or measure less than `smallest` pixels, and fewer than 2 classes."""
    channels, height, width = input_shape
    require(
        min(channels, height, width) >= 1,
        f"input_shape={input_shape} must be (channels, height, width), each at least 1.",
    )
    require(
        min(height, width) >= smallest,
        f"{model} needs images of at least {smallest}x{smallest} pixels, and these are {height}x{width}; "
        "choose a smaller network such as small_cnn or mlp.",
    )
    require(num_classes >= 2, f"num_classes={num_classes} must be at least 2.")


def require_unit_range(x: Tensor) -> None:
    """Refuse inputs that are not images in [0, 1]: a radius means pixels only there."""
    if x.numel() and not (float(x.min()) >= 0.0 and float(x.max()) <= 1.0):
        raise BadValue(
            f"inputs run from {float(x.min()):g} to {float(x.max()):g}, but must lie in [0, 1]; "
            "move normalisation into the model and scale the images."
        )
