"""ONNX operators that only move numbers: reshaping, slicing, joining, and the small algebra of shapes around them.

Exporters write `x.flatten(1)` as a chain of Shape, Gather, Concat and Reshape. The chain is followed at import, with a
symbol for the batch size, so that what remains is a plain `nn.Flatten`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trivet.models.foreign.assembly import Flow, Sizes, Unsupported, Value, record_shape, refuse_unless, without_batch
from trivet.models.foreign.onnx_graph import Operator, Step


def _identity(step: Step) -> Value:
    value = step.given(0)
    if value is None:
        raise Unsupported("lacks its input")
    return value


def _cast(step: Step) -> Value:
    value = step.given(0)
    # The numbers of TensorProto.DataType.
    kinds = {1: torch.float32, 6: torch.int32, 7: torch.int64, 9: torch.bool}
    to = kinds.get(step.attributes["to"])
    if isinstance(value, Tensor) and to is not None:
        return value.to(to)
    refuse_unless(isinstance(value, Sizes) or to is torch.float32, f"casts to type {step.attributes['to']}")
    return _identity(step)


def _dropout(step: Step) -> Value:
    training = step.constant(2)
    refuse_unless(training is None or not bool(training), "is in training mode")
    refuse_unless(step.outputs == 1, "asks for the dropout mask")
    return _identity(step)


def _constant(step: Step) -> Value:
    for name in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        if name in step.attributes:
            value = step.attributes[name]
            return value if isinstance(value, Tensor) else torch.tensor(value)
    raise Unsupported("holds neither numbers nor a tensor")


def _shape(step: Step) -> Value:
    x = step.value()
    if isinstance(x, Tensor):
        sizes: tuple[int | None, ...] = tuple(x.shape)
    else:
        sizes = (None, *x.shape) if step.batched else x.shape
    sizes = sizes[slice(step.attributes.get("start", 0), step.attributes.get("end"))]
    known = [size for size in sizes if size is not None]
    return torch.tensor(known, dtype=torch.int64) if len(known) == len(sizes) else Sizes(sizes)


def _reshape(step: Step) -> Value:
    x, target = step.given(0), step.given(1)
    if target is None and "shape" in step.attributes:
        target = torch.tensor(step.attributes["shape"])
    if isinstance(x, Sizes):
        return x
    if not isinstance(x, (Flow, Tensor)) or target is None or isinstance(target, Flow):
        raise Unsupported("takes the shape from the data")
    wanted = list(target.entries) if isinstance(target, Sizes) else [int(n) for n in target.flatten()]
    if isinstance(x, Tensor):
        refuse_unless(None not in wanted, "spreads a constant over the batch")
        return x.reshape([x.shape[i] if n == 0 else n for i, n in enumerate(wanted)])  # type: ignore[misc]
    return step.assembly.reshape(x, _target(step, x, wanted))


def _target(step: Step, x: Flow, wanted: Sequence[int | None]) -> list[int]:
    """The shape of a record, from a shape that may begin with the batch and may leave one entry open."""
    old: tuple[int | None, ...] = (None, *x.shape) if step.batched else x.shape
    copies = not step.attributes.get("allowzero", 0)
    new: Sequence[int | None] = [old[i] if n == 0 and copies and i < len(old) else n for i, n in enumerate(wanted)]
    if step.batched:
        new = without_batch(new, step.declared)
    return record_shape(new, math.prod(x.shape))


def _flatten(step: Step) -> Value:
    x = step.flow()
    axis = step.attributes.get("axis", 1)
    axis = axis + step.rank(x) if axis < 0 else axis
    refuse_unless(step.batched and axis >= 1, "flattens the batch")
    refuse_unless(math.prod(x.shape[: axis - 1]) == 1, "flattens parts of a record into the batch")
    return step.assembly.reshape(x, [math.prod(x.shape)])


def _transpose(step: Step) -> Value:
    x = step.value()
    order = step.ints("perm") or list(reversed(range(step.rank(x))))
    if isinstance(x, Tensor):
        return x.permute(order)
    refuse_unless(not step.batched or order[0] == 0, "moves the batch away from the first axis")
    axes = [step.axis(a, x) for a in order[step.batched :]]
    return x if axes == sorted(axes) else step.assembly.call(torch.permute, x, [0, *axes])


def _squeeze(step: Step) -> Value:
    x = step.given(0)
    if isinstance(x, Sizes):
        return x
    x, axes = step.value(), step.ints("axes", 1)
    if isinstance(x, Tensor):
        return x.squeeze() if axes is None else x.squeeze(axes)
    refuse_unless(
        axes is not None or not step.batched or step.declared != 1, "drops every axis of size 1, the batch too"
    )
    drop = {step.axis(a, x) - 1 for a in axes} if axes else {i for i, size in enumerate(x.shape) if size == 1}
    refuse_unless(all(x.shape[i] == 1 for i in drop), "drops an axis of more than one entry")
    return step.assembly.reshape(x, [size for i, size in enumerate(x.shape) if i not in drop])


def _unsqueeze(step: Step) -> Value:
    x = step.given(0)
    if isinstance(x, Sizes):
        return x
    x, axes = step.value(), step.ints("axes", 1) or []
    rank = step.rank(x) + len(axes)
    if isinstance(x, Tensor):
        for axis in sorted(a % rank for a in axes):
            x = x.unsqueeze(axis)
        return x
    new, sizes = {step.axis(a, x, rank) - 1 for a in axes}, iter(x.shape)
    return step.assembly.reshape(x, [1 if i in new else next(sizes) for i in range(rank - step.batched)])


def _concat(step: Step) -> Value:
    parts = list(step.inputs)
    if any(isinstance(part, Sizes) for part in parts):
        entries: list[int | None] = []
        for part in parts:
            if not isinstance(part, (Sizes, Tensor)):
                raise Unsupported("joins sizes and data")
            entries += part.entries if isinstance(part, Sizes) else [int(n) for n in part.flatten()]
        return Sizes(tuple(entries))
    values = [step.value(i) for i in range(len(parts))]
    axes = {step.axis(step.attributes["axis"], value) for value in values}
    refuse_unless(len({isinstance(value, Flow) for value in values}) == 1, "joins constants and data")
    return step.assembly.apply(torch.cat, values, axes.pop())


def _gather(step: Step) -> Value:
    x, indices = step.given(0), step.weight(1)
    if isinstance(x, Sizes):
        picked = tuple(x.entries[int(i)] for i in indices.flatten())
        return Sizes(picked) if None in picked else torch.tensor(picked).reshape(indices.shape)
    x = step.value()
    axis = step.axis(step.attributes.get("axis", 0), x)
    refuse_unless(indices.ndim <= 1, "gathers by a table of indices")
    size = x.shape[axis - 1] if isinstance(x, Flow) else x.shape[axis]
    refuse_unless(bool(((indices >= -size) & (indices < size)).all()), "gathers beyond the end")
    indices = torch.where(indices < 0, indices + size, indices)
    if indices.ndim:
        return step.assembly.apply(torch.index_select, x, axis, indices)
    return x.select(axis, int(indices)) if isinstance(x, Tensor) else step.assembly.pick(x, axis, int(indices))


def _slice(step: Step) -> Value:
    starts, ends = step.ints("starts", 1) or [], step.ints("ends", 2) or []
    axes, strides = step.ints("axes", 3) or list(range(len(starts))), step.ints("steps", 4) or [1] * len(starts)
    refuse_unless(len(starts) == len(ends) == len(axes) == len(strides), "has bounds of different lengths")
    refuse_unless(all(stride >= 1 for stride in strides), "slices backwards")
    x: Any = step.given(0)
    for start, end, axis, stride in zip(starts, ends, axes, strides, strict=True):
        part = slice(start, end, stride)
        if isinstance(x, Sizes):
            x = Sizes(x.entries[part])
        elif isinstance(x, Tensor):
            x = x[(*[slice(None)] * step.axis(axis, x), part)]
        else:
            x = step.assembly.pick(x, step.axis(axis, x), part)
    return x


MOVES: dict[str, Operator] = {
    "Cast": _cast,
    "Concat": _concat,
    "Constant": _constant,
    "Dropout": _dropout,
    "Flatten": _flatten,
    "Gather": _gather,
    "Identity": _identity,
    "Reshape": _reshape,
    "Shape": _shape,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
