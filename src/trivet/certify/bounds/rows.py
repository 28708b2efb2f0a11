"""Coefficients of a linear bound in the numbers of one node, written down where they are not 0: rows of one record."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from trivet.certify.bounds.affine import Convolution


@dataclass(frozen=True, eq=False)
class Units:
    """Multiples of rows of the identity: [R] places and factors, `plain` where all are 1."""

    places: Tensor
    factor: Tensor
    plain: bool = False


@dataclass(frozen=True, eq=False)
class Columns:
    """Rows [R, m] of a record of shape `shape`, that are 0 outside of the m `columns` of its numbers.

    With `parting`, [R, m'] in the columns `parts`, they stand for 2 R rows: `values` + `parting` and -`values` +
    `parting`.
    """

    values: Tensor
    columns: Tensor
    shape: torch.Size
    parting: Tensor | None = None
    parts: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Windows:
    """Rows [R, C, h, w] that are 0 outside of a window of the map; row r has the corner number `corner[r]`.

    Corners may lie outside of the map. Not `inside`, values there are yet to be set to 0.
    """

    values: Tensor
    corner: Tensor
    top: Tensor
    left: Tensor
    inside: bool

    @property
    def size(self) -> tuple[int, int]:
        return self.values.shape[2], self.values.shape[3]


Rows = Tensor | Units | Columns | Windows
"""Of one node and one record; a tensor is [R, *shape]."""


def inner_of(rows: Rows, values: Tensor) -> Tensor:
    """<row, values>, [R]."""
    flat = values.reshape(-1)
    if isinstance(rows, Tensor):
        return rows.flatten(1) @ flat
    if isinstance(rows, Units):
        return rows.factor * flat[rows.places]
    if isinstance(rows, Windows):
        if values.stride()[1:] == (0, 0):  # the same in all of the map
            return rows.values.sum((2, 3)) @ values[:, 0, 0]
        return (rows.values * seen(values, rows)).flatten(1).sum(1)
    whole = rows.values @ flat[rows.columns]
    if rows.parting is None or rows.parts is None:
        return whole
    apart = rows.parting @ flat[rows.parts]
    return torch.cat([apart + whole, apart - whole])


def absolute(rows: Rows) -> Rows:
    if isinstance(rows, Tensor):
        return rows.abs()
    return (
        replace(rows, factor=rows.factor.abs()) if isinstance(rows, Units) else replace(rows, values=rows.values.abs())
    )


def signed(rows: Rows, sign: int) -> Rows:
    return rows if sign > 0 else scaled_by(rows, -1.0)


def scaled_by(rows: Rows, factor: float) -> Rows:
    if isinstance(rows, Tensor):
        return rows * factor
    if isinstance(rows, Units):
        return replace(rows, factor=rows.factor * factor, plain=False)
    parting = None if not isinstance(rows, Columns) or rows.parting is None else rows.parting * factor
    new = replace(rows, values=rows.values * factor)
    return new if parting is None or isinstance(new, Windows) else replace(new, parting=parting)


def scaled(rows: Rows, factor: Tensor, shape: torch.Size) -> Rows:
    if isinstance(rows, Tensor):
        return rows * factor
    whole = factor.expand(shape)
    if isinstance(rows, Windows):
        by = whole[:, :1, :1] if whole.stride()[1:] == (0, 0) else seen(whole, rows)
        return replace(rows, values=rows.values * by)
    flat = whole.reshape(-1)
    if isinstance(rows, Units):
        return replace(rows, factor=rows.factor * flat[rows.places], plain=False)
    parting = None if rows.parting is None or rows.parts is None else rows.parting * flat[rows.parts]
    return replace(rows, values=rows.values * flat[rows.columns], parting=parting)


def multiplied(rows: Units | Columns, weight: Tensor) -> Tensor:
    if isinstance(rows, Units):
        taken = weight.index_select(0, rows.places)
        return taken if rows.plain else taken * rows.factor[:, None]
    whole = rows.values @ (weight if len(rows.columns) == len(weight) else weight[rows.columns])
    if rows.parting is None or rows.parts is None:
        return whole
    apart = rows.parting @ weight[rows.parts]
    both = whole.new_empty(2, *whole.shape)
    torch.add(apart, whole, out=both[0])
    torch.sub(apart, whole, out=both[1])
    return both.flatten(0, 1)


# Windows


def seen(values: Tensor, rows: Windows) -> Tensor:
    """What each window shows of a map [C, H, W], 0 beyond it: [R, C, h, w]."""
    height, width = rows.size
    top, left = rows.top, rows.left
    above, beside = max(0, -int(top.min())), max(0, -int(left.min()))
    under = max(0, int(top.max()) + height - values.shape[1])
    beyond = max(0, int(left.max()) + width - values.shape[2])
    padded = F.pad(values, (beside, beyond, above, under))
    windows = padded.unfold(1, height, 1).unfold(2, width, 1)[:, top + above, left + beside]
    return windows.transpose(0, 1).contiguous().index_select(0, rows.corner)


def seen_by(rows: Units, layer: Convolution, size: torch.Size) -> Windows:
    """Rows of single outputs, on a map of this size, as what their kernels see."""
    height, width = size
    channel, place = rows.places // (height * width), rows.places % (height * width)
    where, corner = place.unique(return_inverse=True)
    values = layer.weight.index_select(0, channel)
    values = values if rows.plain else values * rows.factor.view(-1, 1, 1, 1)
    if layer.dilation != (1, 1):
        extent = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.weight.shape[2:], strict=True)]
        spread = values.new_zeros(*values.shape[:2], *extent)
        spread[:, :, :: layer.dilation[0], :: layer.dilation[1]] = values
        values = spread
    top, left = (
        side * stride - pad
        for side, stride, pad in zip((where // width, where % width), layer.stride, layer.padding, strict=True)
    )
    return Windows(values, corner, top, left, False)


def points(rows: Units, shape: torch.Size) -> Windows:
    """Rows of single numbers of a map as windows of one pixel."""
    size = shape[1:].numel()
    where, corner = (rows.places % size).unique(return_inverse=True)
    values = rows.factor.new_zeros(len(corner), shape[0])
    values.scatter_(1, (rows.places // size)[:, None], rows.factor[:, None])
    return Windows(values[:, :, None, None], corner, where // shape[2], where % shape[2], True)


def transposed(values: Tensor, layer: Convolution) -> Tensor:
    """What the windows [R, C, h, w] see before the layer, all of it: no padding cuts anything off."""
    sides = [
        (side - 1) * stride + dilation * (kernel - 1) + 1
        for side, stride, dilation, kernel in zip(
            values.shape[2:], layer.stride, layer.dilation, layer.weight.shape[2:], strict=True
        )
    ]
    shape = torch.Size((layer.weight.shape[1] * layer.groups, *sides))
    return replace(layer, padding=(0, 0)).transposed(values, [shape])[0]


def moved(rows: Windows, left: int, top: int) -> Windows:
    """Before padding by so much on the left and above."""
    return replace(rows, top=rows.top - top, left=rows.left - left, inside=False)


def written(rows: Windows, shape: torch.Size) -> Tensor:
    """[R, C, H, W]; what lies outside of the map is left out."""
    height, width = rows.size
    count = len(rows.values)
    top, left = rows.top[rows.corner], rows.left[rows.corner]
    above, beside = max(0, -int(top.min())), max(0, -int(left.min()))
    tall = above + max(shape[1], int(top.max()) + height)
    wide = beside + max(shape[2], int(left.max()) + width)
    inner = torch.arange(height, device=top.device)[:, None] * wide + torch.arange(width, device=top.device)
    index = ((top + above) * wide + left + beside)[:, None] + inner.flatten()
    canvas = rows.values.new_zeros(count, shape[0], tall * wide)
    canvas.scatter_(2, index[:, None].expand(-1, shape[0], -1), rows.values.flatten(2))
    return canvas.view(count, shape[0], tall, wide)[:, :, above : above + shape[1], beside : beside + shape[2]]


def joined(one: Windows, other: Windows) -> Windows | None:
    """The sum of windows at the same corners up to one shift for all; None for others."""
    if len(one.top) != len(other.top) or not torch.equal(one.corner, other.corner):
        return None
    down, right = (other.top - one.top).unique(), (other.left - one.left).unique()
    if len(down) != 1 or len(right) != 1:
        return None
    shift = (int(down), int(right))
    first = [min(0, each) for each in shift]
    last = [max(a, b + each) for a, b, each in zip(one.size, other.size, shift, strict=True)]
    pads = []
    for size, at in ((one.size, (0, 0)), (other.size, shift)):
        before = [a - f for a, f in zip(at, first, strict=True)]
        after = [end - a - s for end, a, s in zip(last, at, size, strict=True)]
        pads.append((before[1], after[1], before[0], after[0]))
    values = F.pad(one.values, pads[0]) + F.pad(other.values, pads[1])
    return Windows(values, one.corner, one.top + first[0], one.left + first[1], one.inside and other.inside)
