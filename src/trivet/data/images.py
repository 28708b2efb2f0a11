"""Encoded images (PNG, JPEG, …) to one uint8 tensor: decoded once, all of one size and one colour mode."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from trivet.data.extras import extra, in_one_line
from trivet.errors import BadValue, require

Mode = Literal["L", "RGB"]
"""Grey, one channel, or colour, three."""

Size = tuple[int, int]
"""(height, width) in pixels."""

# Nothing that Pillow hands to an outside program (EPS): files come from strangers.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
_CHANNELS = {"L": 1, "RGB": 3}


def decode(encoded: Iterable[tuple[str, bytes]], size: Size | None = None, mode: Mode | None = None) -> Tensor:
    """[N, C, H, W] uint8 of N images, given as pairs of a name for error messages and the encoded bytes.

    Args:
        encoded: the images, decoded one after another (30 µs for an MNIST digit, 90 µs for a CIFAR-10 JPEG; threads
            do not help, the work per image is too small).
        size: resize all to this (bilinear). None: they must have one size already.
        mode: convert all to grey or colour. None: they must agree already, and be one of the two.

    Raises:
        BadValue: an image that cannot be read, or differs from the first one; the message names it.
    """
    with extra("images", "reading images needs pillow"):
        from PIL import Image, UnidentifiedImageError

    require(size is None or min(size) > 0, f"size={size} must be a positive (height, width).")
    pixels, first, wanted = bytearray(), "", None
    for name, content in encoded:
        try:
            with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
                shaped = _shaped(image, size, mode)
                values = shaped.tobytes()
        except Exception as error:  # on damaged files Pillow's parsers raise errors of every kind
            reason = "no known format" if isinstance(error, UnidentifiedImageError) else in_one_line(error)
            raise BadValue(f"{name} cannot be read as an image ({reason}); replace it or leave it out.") from None
        found = (shaped.mode, *reversed(shaped.size))
        if wanted is None:
            require(
                shaped.mode in _CHANNELS,
                f"{name} has colour mode {shaped.mode}, neither grey (L) nor colour (RGB); set mode to convert all.",
            )
            first, wanted = name, found
        require(
            found == wanted,
            f"{name} is {_described(found)} but {first} is {_described(wanted)}; set size (and mode) to convert all.",
        )
        pixels += values
    if wanted is None:
        return torch.empty(0, _CHANNELS[mode or "L"], *(size or (1, 1)), dtype=torch.uint8)
    mode_found, height, width = wanted
    array = np.frombuffer(pixels, np.uint8).reshape(-1, height, width, _CHANNELS[mode_found])
    return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()


def _shaped(image: Any, size: Size | None, mode: Mode | None) -> Any:
    if mode is not None and image.mode != mode:
        image = image.convert(mode)
    if size is not None and image.size != (size[1], size[0]):
        image = image.resize((size[1], size[0]), resample=2)  # bilinear
    return image


def _described(found: tuple[str, int, int]) -> str:
    return f"{found[1]}x{found[2]} {found[0]}"
