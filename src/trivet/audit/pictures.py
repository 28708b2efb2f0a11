"""Images as data URIs: a PNG writer of a dozen lines, so that a report needs no imaging library."""

from __future__ import annotations

import base64
import struct
import zlib

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = 96
"""Pictures with longer sides are averaged down: a report shows many, and stays small."""


def png(image: Tensor) -> bytes:
    """`image` [C, H, W] in [0, 1] as an 8-bit PNG: grey for one channel, colour for three, else the first channel."""
    if len(image) not in (1, 3):
        image = image[:1]
    levels = (image.clamp(0, 1) * 255).round().to(torch.uint8).movedim(0, -1)
    height, width, channels = levels.shape
    rows = levels.reshape(height, width * channels)
    lines = torch.cat([rows.new_zeros(height, 1), rows], 1).contiguous().numpy().tobytes()  # 0: no filter
    header = struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, content) for kind, content in chunks)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def data_uri(image: Tensor) -> str:
    """`image` [C, H, W] in [0, 1], at most `LARGEST` pixels to a side."""
    scale = max(image.shape[1:]) / LARGEST
    if scale > 1:
        size = [max(1, round(side / scale)) for side in image.shape[1:]]
        image = F.interpolate(image[None].float(), size=size, mode="area")[0]
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


def difference(clean: Tensor, adversarial: Tensor) -> tuple[Tensor, float]:
    """What was changed, on mid-grey and amplified until the largest change is black or white; and the factor."""
    change = adversarial - clean
    largest = float(change.abs().max())
    factor = 0.5 / largest if largest else 1.0
    return 0.5 + factor * change, factor
