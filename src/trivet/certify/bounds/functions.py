"""Which bounds each kind of PyTorch function and method has. What is not here is refused, never skipped."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trivet.certify.bounds.activations import Monotone, Rectifier, sigmoid, tanh
from trivet.certify.bounds.affine import Convolution, Linear
from trivet.certify.bounds.moving import Concatenation, Padding, Scale, Sum
from trivet.certify.bounds.pooling import MaxPool
from trivet.certify.bounds.steps import PROBES, Builder, Constant, Flow, Reader, refuse_unless


def per_axis(value: Any, length: int) -> tuple[int, ...]:
    """A number for each axis, as PyTorch lets its users write it."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * length


def _add(build: Builder, a: Any, b: Any, *, alpha: float = 1.0) -> Flow:
    refuse_unless(alpha == 1, "adds with a factor")
    return _sum(build, a, b, 1)


def _subtract(build: Builder, a: Any, b: Any, *, alpha: float = 1.0) -> Flow:
    refuse_unless(alpha == 1, "subtracts with a factor")
    return _sum(build, a, b, -1)


def _sum(build: Builder, a: Any, b: Any, sign: int) -> Flow:
    """a + sign b, of which at least one depends on the input."""
    if isinstance(a, Flow) and isinstance(b, Flow):
        refuse_unless(build.shape(a) == build.shape(b), f"adds values of {build.shape(a)} and {build.shape(b)}")
        return build.add(lambda _: Sum((1, sign)), a, b)
    x, constant = (a, b) if isinstance(a, Flow) else (b, a)
    own = 1.0 if x is a else float(sign)
    other = float(sign) if x is a else 1.0

    def make(read: Reader) -> Scale:
        shift = build.beside(x, read, constant)
        return Scale(torch.full_like(shift, own), other * shift, rounded=1)

    return build.keeping_shape(make, x)


def _multiply(build: Builder, a: Any, b: Any) -> Flow:
    refuse_unless(not (isinstance(a, Flow) and isinstance(b, Flow)), "multiplies two values that depend on the input")
    x, constant = (a, b) if isinstance(a, Flow) else (b, a)
    return build.keeping_shape(lambda read: Scale(build.beside(x, read, constant), rounded=1), x)


def _divide(build: Builder, a: Any, b: Any) -> Flow:
    refuse_unless(not isinstance(b, Flow), "divides by a value that depends on the input")
    # Some kernels divide, others multiply by the rounded inverse.
    return build.keeping_shape(lambda read: Scale(1 / build.beside(a, read, b), rounded=3), a)


def _matmul(build: Builder, a: Any, b: Any) -> Flow:
    refuse_unless(not (isinstance(a, Flow) and isinstance(b, Flow)), "multiplies two values that depend on the input")
    if isinstance(a, Flow):
        refuse_unless(build.tensor(b).ndim == 2, "multiplies by something other than a matrix")
        return build.add(lambda read: Linear(read(build.tensor(b)).T), a)
    refuse_unless(build.tensor(a).ndim == 2 and b.rank == 2, "multiplies by something other than a matrix")
    turned = build.move(lambda value: value.mT, b)
    product = build.add(lambda read: Linear(read(build.tensor(a))), turned)
    return build.move(lambda value: value.mT, product)


def _functional_linear(build: Builder, x: Flow, weight: Any, bias: Any = None) -> Flow:
    return build.add(lambda read: Linear(read(build.tensor(weight)), read.optional(build.value(bias))), x)


def _functional_convolution(
    build: Builder,
    x: Flow,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Flow:
    refuse_unless(not isinstance(padding, str), f"pads by {padding!r} outside of a layer")
    axes = x.rank - 1

    def make(read: Reader) -> Convolution:
        tensors = read(build.tensor(weight)), read.optional(build.value(bias))
        return Convolution(*tensors, per_axis(stride, axes), per_axis(padding, axes), per_axis(dilation, axes), groups)

    return build.add(make, x)


def max_pool2d(
    build: Builder,
    x: Flow,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Flow:
    refuse_unless(not return_indices, "asks for the positions of the maxima")
    refuse_unless(x.rank == 3, f"pools records of {x.rank} axes")
    kernel, pad, dilate = (per_axis(each, 2) for each in (kernel_size, padding, dilation))
    step = kernel if stride is None else per_axis(stride, 2)
    return build.add(lambda _: MaxPool(kernel, step, pad, dilate, ceil_mode), x)  # type: ignore[arg-type]


def _averaged(function: Callable[..., Tensor]) -> Callable[..., Flow]:
    def lower(build: Builder, x: Flow, kernel_size: Any, *args: Any, **kwargs: Any) -> Flow:
        terms = math.prod(per_axis(kernel_size, x.rank - 1))
        return build.average(lambda value: function(value, kernel_size, *args, **kwargs), x, terms)

    return lower


def _adaptively_averaged(function: Callable[..., Tensor]) -> Callable[..., Flow]:
    def lower(build: Builder, x: Flow, output_size: Any) -> Flow:
        return build.average(lambda value: function(value, output_size), x, math.prod(build.shape(x)[1:]))

    return lower


def _mean(build: Builder, x: Flow, dim: Any, keepdim: bool = False) -> Flow:
    axes = dim if isinstance(dim, (tuple, list)) else (dim,)
    terms = math.prod((PROBES, *build.shape(x))[axis] for axis in axes)
    return build.average(lambda value: value.mean(dim, keepdim), x, terms)


def pad(build: Builder, x: Flow, amounts: Sequence[int], mode: str = "constant", value: float | None = None) -> Flow:
    """F.pad; constants other than 0 are added where nothing was."""
    fill = 0.0 if value is None else float(value)
    if mode != "constant" or fill == 0:
        return build.move(lambda each: F.pad(each, list(amounts), mode), x)
    refuse_unless(math.isfinite(fill), f"pads with {fill}")

    def padded(each: Tensor) -> Tensor:
        return F.pad(each, list(amounts))

    before = (amounts[0], amounts[2]) if len(amounts) == 4 else None
    if fill == 0:
        return build.add(lambda _: Padding(padded, None, before), x)
    filled = fill * (1 - padded(torch.ones_like(build.values[x.node][0])))
    return build.add(lambda read: Padding(padded, read(filled), before), x)


def _cat(build: Builder, tensors: Sequence[Any], dim: int = 0) -> Flow:
    refuse_unless(all(isinstance(each, Flow) for each in tensors), "joins constants to values of the data")
    axis = dim if dim >= 0 else dim + tensors[0].rank + 1
    refuse_unless(axis >= 1, "joins along the batch, which would mix its records")
    return build.add(lambda _: Concatenation(axis), *tensors)


def _leaky_relu(build: Builder, x: Flow, negative_slope: float = 0.01, **_inplace: bool) -> Flow:
    return build.add(lambda _: Rectifier(float(negative_slope)), x)


def _rectified(build: Builder, x: Flow, **_inplace: bool) -> Flow:
    return build.add(lambda _: Rectifier(), x)


def _clamp(build: Builder, x: Flow, min: Any = None, max: Any = None) -> Flow:
    refuse_unless(all(each is None or isinstance(each, (int, float)) for each in (min, max)), "clamps to a tensor")
    if max is None and min == 0:
        return _rectified(build, x)
    return build.add(lambda _: Monotone(lambda t: t.clamp(min, max)), x)


def _dropped(_build: Builder, x: Flow, _p: float = 0.5, training: bool = True, **_others: Any) -> Flow:
    refuse_unless(not training, "drops values at random even in eval mode")
    return x


def _moved(function: Callable[..., Tensor]) -> Callable[..., Flow]:
    """Functions that only move numbers, whose other arguments are the same for every batch."""

    def lower(build: Builder, x: Flow, *args: Any, **kwargs: Any) -> Flow:
        args, kwargs = build.resolved(args), build.resolved(kwargs)
        return build.move(lambda value: function(value, *args, **kwargs), x)

    return lower


def _reshaped(function: Callable[..., Tensor]) -> Callable[..., Flow]:
    """Functions that keep the order of numbers, whatever they say about the batch."""

    def lower(build: Builder, x: Flow, *args: Any, **kwargs: Any) -> Flow:
        args, kwargs = build.resolved(args), build.resolved(kwargs)
        return build.reshape(x, lambda value: function(value, *args, **kwargs))

    return lower


def _shape(build: Builder, x: Flow, name: str) -> Constant:
    refuse_unless(name == "shape", f"asks for {name!r} of a value")
    return Constant(lambda: (PROBES, *build.shape(x)))


def _size(build: Builder, x: Flow, dim: int | None = None) -> Constant:
    sizes = (PROBES, *build.shape(x))
    return Constant(lambda: sizes if dim is None else sizes[dim])


FUNCTIONS: dict[Any, Callable[..., Any]] = {
    operator.add: _add,
    operator.iadd: _add,
    torch.add: _add,
    operator.sub: _subtract,
    operator.isub: _subtract,
    torch.sub: _subtract,
    operator.mul: _multiply,
    operator.imul: _multiply,
    torch.mul: _multiply,
    operator.truediv: _divide,
    operator.itruediv: _divide,
    torch.div: _divide,
    operator.neg: lambda build, x: _multiply(build, x, -1.0),
    torch.neg: lambda build, x: _multiply(build, x, -1.0),
    operator.matmul: _matmul,
    torch.matmul: _matmul,
    operator.getitem: _moved(operator.getitem),
    getattr: _shape,
    F.linear: _functional_linear,
    F.conv1d: _functional_convolution,
    F.conv2d: _functional_convolution,
    F.conv3d: _functional_convolution,
    F.max_pool2d: max_pool2d,
    torch.max_pool2d: max_pool2d,
    F.avg_pool1d: _averaged(F.avg_pool1d),
    F.avg_pool2d: _averaged(F.avg_pool2d),
    F.adaptive_avg_pool1d: _adaptively_averaged(F.adaptive_avg_pool1d),
    F.adaptive_avg_pool2d: _adaptively_averaged(F.adaptive_avg_pool2d),
    torch.mean: _mean,
    F.pad: pad,
    torch.cat: _cat,
    F.relu: _rectified,
    torch.relu: _rectified,
    F.leaky_relu: _leaky_relu,
    torch.sigmoid: lambda build, x: build.add(lambda _: sigmoid(), x),
    F.sigmoid: lambda build, x: build.add(lambda _: sigmoid(), x),
    torch.tanh: lambda build, x: build.add(lambda _: tanh(), x),
    F.tanh: lambda build, x: build.add(lambda _: tanh(), x),
    torch.clamp: _clamp,
    F.dropout: _dropped,
    torch.flatten: _reshaped(torch.flatten),
    torch.reshape: _reshaped(torch.reshape),
    torch.squeeze: _moved(torch.squeeze),
    torch.unsqueeze: _moved(torch.unsqueeze),
    torch.permute: _moved(torch.permute),
    torch.transpose: _moved(torch.transpose),
    torch.index_select: _moved(torch.index_select),
}
METHODS: Mapping[str, Callable[..., Any]] = {
    "add": _add,
    "add_": _add,
    "sub": _subtract,
    "mul": _multiply,
    "div": _divide,
    "matmul": _matmul,
    "mean": _mean,
    "relu": _rectified,
    "relu_": _rectified,
    "sigmoid": FUNCTIONS[torch.sigmoid],
    "tanh": FUNCTIONS[torch.tanh],
    "clamp": _clamp,
    "size": _size,
    "contiguous": lambda _build, x, **_format: x,
    **{name: _reshaped(getattr(Tensor, name)) for name in ("flatten", "view", "reshape", "unflatten")},
    **{name: _moved(getattr(Tensor, name)) for name in ("squeeze", "unsqueeze", "permute", "transpose")},
}
