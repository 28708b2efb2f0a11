"""The choice between kinds of normalisation without parameters, as private training wants it, made in one place."""

from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trivet.errors import TrivetError, require
from trivet.models.public_batch_norm import PublicBatchNorm, WithPublicRows

BareNorm = Literal["none", "layer", "group", "public_batch", "mixed_batch"]
"""`layer`, `group`: each record by itself. `public_batch`: by public images. `mixed_batch`: by public images and the
other records of the batch, as SIDP published it; private rules refuse that."""


def bare_norm(norm: BareNorm, shape: tuple[int, ...]) -> nn.Module:
    """The layer for records of `shape`: maps (C, H, W) or vectors (C,)."""
    if norm == "layer":
        return nn.LayerNorm(list(shape), elementwise_affine=False)
    if norm == "group":
        groups = math.gcd(4, shape[0])
        require(math.prod(shape) > groups, f"norm='group' needs more than {groups} values in a layer, not {shape}.")
        return nn.GroupNorm(groups, shape[0], affine=False)
    if norm == "none":
        return nn.Identity()
    return PublicBatchNorm(spatial=len(shape) == 3, mixed=norm == "mixed_batch")


def assembled(
    layers: OrderedDict[str, nn.Module],
    norm: BareNorm,
    input_shape: tuple[int, int, int],
    public_images: Path | None,
    generator: torch.Generator | None,
) -> nn.Module:
    """The chain of `layers`, with public images beside it where `norm` takes its statistics from them."""
    chain = nn.Sequential(layers)
    if norm in ("public_batch", "mixed_batch"):
        return WithPublicRows(chain, public_rows(input_shape, public_images, generator))
    require(public_images is None, f"public_images={public_images} must be left out: norm={norm!r} has no use for it.")
    return chain


def public_rows(input_shape: tuple[int, int, int], file: Path | None, generator: torch.Generator | None) -> Tensor:
    """Public images [A, C, H, W] in [0, 1]: of a .npy file (uint8, or floats in [0, 1]), or 30 coarse random patterns.

    Patterns are public because nobody's data are in them, and they are a poor stand-in: on digits, under DP-SGD at
    z = 2, they give 0.85, no normalisation 0.90, and real digits as public images 0.95 (one seed).

    Raises:
        TrivetError: a file that cannot be read; BadValue: one that holds no such images.
    """
    if file is None:
        coarse = torch.rand(30, input_shape[0], 4, 4, generator=generator)
        return F.interpolate(coarse, size=input_shape[1:], mode="bilinear")
    try:
        stored = np.load(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise TrivetError(f"cannot read public images from {file} ({error}); save them with numpy.save.") from None
    images = torch.from_numpy(stored)
    images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    require(
        images.ndim == 4 and tuple(images.shape[1:]) == input_shape and len(images) > 1,
        f"public_images={file} must hold at least two images of shape {input_shape}, not {tuple(images.shape)}.",
    )
    require(
        bool(((images >= 0) & (images <= 1)).all()), f"public_images={file} must lie in [0, 1], or be uint8 pixels."
    )
    return images
