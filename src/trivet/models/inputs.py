"""The question every network asks first: does an input of this shape fit through me?"""

from __future__ import annotations

from trivet.errors import require


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
